import dataclasses
import pytest
import jax, jax.numpy as jnp, numpy as np
from pallas_kernels.ssd import pallas_gpu
from tests.kernels import walk_emulation
from tests.kernels.ssd_suite import SSDSuite


class TestAroundTheKernel(SSDSuite):
    implementation = "pallas_gpu"

    @pytest.fixture(autouse=True, params=[1, 3], ids=["whole", "split"])
    def emulated(self, monkeypatch, request):
        monkeypatch.setattr(pallas_gpu, "_walk", walk_emulation.walk)
        monkeypatch.setattr(pallas_gpu, "why_not_ssd", lambda *args, **kwargs: None)
        make_plan = pallas_gpu.make_plan

        def split(*args):
            plan = make_plan(*args)
            parts = min(request.param, plan.chunks)
            return dataclasses.replace(plan, parts=parts, chunks=-(-plan.chunks // parts) * parts)

        monkeypatch.setattr(pallas_gpu, "make_plan", split)
        jax.clear_caches()

    def step(self, **options):
        pytest.skip("no kernel")
