"""Every case a backend of `mamba2_grid` has to pass; used like `ssd_suite`."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from tests.kernels.compare import BOUNDS, Arrays, assert_close, jitted, outputs_and_gradients

ALL = pk.DIRECTIONS


def problem(grid=(5, 7), k=4, b=2, h=4, p=4, n=4, g=2, w=4, *, dtype="float32", D="h", seed=0) -> Arrays:
    """Every array argument; zxbcdt in `dtype`, the others float32."""
    rng = np.random.default_rng(seed)
    inner, channels = h * p, h * p + 2 * g * n

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    return {
        "zxbcdt": normal(b, grid[0] * grid[1], inner + channels + h).astype(jnp.dtype(dtype)),
        "conv_weight": normal(k, channels, w),
        "A": -rng.uniform(0.5, 4, (k, h)).astype(np.float32),
        "conv_bias": normal(k, channels),
        "D": normal(k, h) if D == "h" else normal(k, h, p),
        "dt_bias": rng.uniform(-4, -1, (k, h)).astype(np.float32),
        "norm_weight": 1 + 0.1 * normal(inner),
    }


class Mamba2GridSuite:
    implementation: str
    bounds = BOUNDS

    def mixer(self, **options):
        return jitted(pk.mamba2_grid, implementation=self.implementation, **options)

    def check(self, arrays: Arrays, *, dtype="float32", **options):
        """The output and all gradients against the recurrence in float64."""
        options = {"grid": (5, 7), "directions": ALL, "groups": 2} | options
        actual = outputs_and_gradients(functools.partial(self.mixer, **options), arrays)
        truth = functools.partial(pk.mamba2_grid, implementation="reference", **options)
        expected = outputs_and_gradients(truth, arrays, "float64")
        for a, e in zip(actual, expected, strict=True):
            assert_close(a, e, self.bounds[dtype])

    @pytest.mark.parametrize("directions", [ALL[1:2], ALL[::-1]], ids=len)
    def test_directions(self, directions):
        arrays = problem((11, 12), len(directions))
        self.check(arrays, grid=(11, 12), directions=directions, dt_limit=(0.05, 0.4))

    @pytest.mark.parametrize("norm_before_gate", [False, True])
    def test_merge_and_norm(self, norm_before_gate):
        arrays = problem(k=2, g=1, D="h p")
        options = {"merge": "sum", "norm_before_gate": norm_before_gate, "norm_eps": 1e-2}
        self.check(arrays, directions=ALL[1:3], groups=1, **options)

    def test_without_optional_arguments(self):
        arrays = problem(b=1, k=2)
        for name in ("conv_bias", "D", "dt_bias"):
            del arrays[name]
        self.check(arrays, directions=ALL[:2])

    @pytest.mark.parametrize("dtype", ["bfloat16"])
    def test_dtypes(self, dtype):
        arrays = problem(b=1, k=2, dtype=dtype)
        assert self.mixer(**arrays, grid=(5, 7), directions=ALL[:2], groups=2).dtype == dtype
        self.bounds = {dtype: 3 * BOUNDS[dtype]}  # rounded after each of the parts
        self.check(arrays, dtype=dtype, directions=ALL[:2])
