"""The Triton backend of `ssd`: for real with `-m gpu`; on a CPU all but the kernels."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from pallas_kernels.specs import SSD_SPECS
from tests.kernels.compare import outputs_and_gradients
from tests.kernels.ssd_suite import SSDSuite, problem


@pytest.mark.gpu
class TestTriton(SSDSuite):
    implementation = "triton"

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    @pytest.mark.parametrize("head_dim, state_size", [(64, 128), (32, 256), (80, 48)])
    def test_as_exact_as_xla(self, dtype, head_dim, state_size):
        ids = np.random.default_rng(0).integers(-1, 3, (2, 6)).repeat(50, axis=1).astype(np.int32)
        arrays = problem(l=300, p=head_dim, n=state_size, D="h p", dtype=dtype)
        on = {"dt_softplus": True, "return_final_state": True, "segment_ids": jnp.asarray(ids)}
        truth, xla, ours = (
            outputs_and_gradients(functools.partial(pk.ssd, implementation=name, **on), arrays, exact)
            for name, exact in (("reference", "float64"), ("xla", None), ("triton", None))
        )
        for expected, theirs, actual in zip(truth, xla, ours, strict=True):
            for name, e in expected.items():
                error, allowed = np.abs(actual[name] - e).max(), 1.5 * np.abs(theirs[name] - e).max()
                assert error <= allowed + 2e-6 * np.abs(e).max(), name

    def test_runs_the_kernel(self):
        """Chosen without being named, where no other kernel takes float32."""
        shapes = SSD_SPECS["image"].shapes()
        shapes |= {name: jax.ShapeDtypeStruct(shapes[name].shape, jnp.float32) for name in ("x", "B", "C")}
        lowered = jax.jit(lambda arrays: pk.ssd(**arrays)).lower(shapes).as_text(debug_info=True)
        assert "triton_kernel_call" in lowered and "ssd_states" in lowered and "ssd_outputs" in lowered

    def test_rows_of_vmap(self):
        arrays = {name: jnp.asarray(a) for name, a in problem(b=3, l=40).items()}
        rows = {name: a[:, None] if a.ndim > 2 else a for name, a in arrays.items()}
        axes = {name: 0 if a.ndim > 2 else None for name, a in arrays.items()}
        y = jax.vmap(lambda arrays: pk.ssd(**arrays, implementation="triton"), (axes,))(rows)
        np.testing.assert_array_equal(y[:, 0], pk.ssd(**arrays, implementation="triton"))
