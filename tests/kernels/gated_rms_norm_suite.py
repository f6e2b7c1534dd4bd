"""Every case a backend of `gated_rms_norm` has to pass; used like `ssd_suite`."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from tests.kernels.compare import BOUNDS, Arrays, assert_close, jitted, outputs_and_gradients


def problem(*shape: int, dtype="float32", seed=0) -> Arrays:
    rng = np.random.default_rng(seed)
    x, z = (rng.normal(size=shape).astype(np.float32).astype(jnp.dtype(dtype)) for _ in range(2))
    return {"x": x, "z": z, "weight": rng.normal(size=shape[-1]).astype(np.float32)}


class GatedRMSNormSuite:
    implementation: str
    bounds = BOUNDS

    def norm(self, **options):
        return jitted(pk.gated_rms_norm, implementation=self.implementation, **options)

    def check(self, arrays: Arrays, *, dtype="float32", **options):
        options = {"eps": 1e-5} | options
        actual = outputs_and_gradients(functools.partial(self.norm, **options), arrays)
        truth = functools.partial(pk.gated_rms_norm, implementation="reference", **options)
        expected = outputs_and_gradients(truth, arrays, "float64")
        for a, e in zip(actual, expected, strict=True):
            assert_close(a, e, self.bounds[dtype])

    # state-spaces/mamba, tests/ops/triton/test_layernorm_gated.py: its RMS cases with a gate, fewer rows.
    @pytest.mark.parametrize("norm_before_gate", [False, True])
    @pytest.mark.parametrize("group_size", [None, 64])
    @pytest.mark.parametrize("width", [2048, 4096])
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    def test_mamba_cases(self, norm_before_gate, group_size, width, dtype):
        arrays = problem(2, 16, width, dtype=dtype)
        assert self.norm(**arrays, eps=1e-5).dtype == dtype
        self.check(arrays, dtype=dtype, norm_before_gate=norm_before_gate, group_size=group_size)

    @pytest.mark.parametrize("shape", [(7,), (1, 1), (3, 5, 9), (2, 3, 1, 6)])
    def test_shapes(self, shape):
        self.check(problem(*shape))

    def test_groups_are_neighbours(self):
        """A group of zeros stays zero and a large one does not shrink its neighbour."""
        x = np.concatenate([np.full((1, 4), 1e4), np.full((1, 4), 1e-2), np.zeros((1, 4))], axis=1).astype(np.float32)
        z = np.full((1, 12), 50, np.float32)  # silu(50) = 50
        y = self.norm(x=x, z=z, weight=np.ones(12, np.float32), eps=1e-12, group_size=4)
        np.testing.assert_allclose(y[0], [1] * 8 + [0] * 4, rtol=1e-4)

    def test_eps(self):
        arrays = problem(4, 16)
        arrays["x"] *= 1e-3
        self.check(arrays, eps=1e-2)
        assert np.abs(self.norm(**arrays, eps=1e-2)).max() < 0.1 < np.abs(self.norm(**arrays, eps=1e-12)).max()

    def test_float32_inside(self):
        """The square of 300 overflows float16, its sums lose bfloat16."""
        arrays = problem(2, 64, dtype="float16")
        arrays["x"] = arrays["x"] * np.float16(300)
        self.check(arrays, dtype="float16")
