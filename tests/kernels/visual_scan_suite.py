"""Every case a backend of `visual_scan` has to pass; used like `ssd_suite`."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from tests.kernels.compare import BOUNDS, Arrays, assert_close, jitted, named, outputs_and_gradients

ALL = pk.DIRECTIONS


def problem(grid=(5, 7), k=4, b=2, h=4, p=4, n=4, g=2, *, dtype="float32", D="h", seed=0) -> Arrays:
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    length, channels = grid[0] * grid[1], h * p + 2 * g * n
    arrays = {
        "x": normal(b, length, h, p),
        "dt": normal(b, length, h),
        "A": -rng.uniform(0.5, 4, (k, h)).astype(np.float32),
        "B": normal(b, length, g, n),
        "C": normal(b, length, g, n),
        "D": normal(k, h) if D == "h" else normal(k, h, p),
        "dt_bias": rng.uniform(-4, -1, (k, h)).astype(np.float32),
        "conv_weight": normal(k, channels, 4),
        "conv_bias": normal(k, channels),
    }
    low = jnp.dtype(dtype)
    return {name: a.astype(low) if name in ("x", "dt", "B", "C") else a for name, a in arrays.items()}


def without(arrays: Arrays, *names: str) -> Arrays:
    return {name: a for name, a in arrays.items() if name not in names}


class VisualScanSuite:
    implementation: str
    bounds = BOUNDS

    def scan(self, **options):
        return jitted(pk.visual_scan, implementation=self.implementation, **options)

    def check(self, arrays: Arrays, *, dtype="float32", **options):
        options = {"grid": (5, 7), "directions": ALL, "dt_softplus": True} | options
        actual = outputs_and_gradients(functools.partial(self.scan, **options), arrays)
        truth = functools.partial(pk.visual_scan, implementation="reference", **options)
        expected = outputs_and_gradients(truth, arrays, "float64")
        for a, e in zip(actual, expected, strict=True):
            assert_close(a, e, self.bounds[dtype])

    @pytest.mark.parametrize("directions", [*((d,) for d in ALL), ALL[:2], ALL, ALL[::-1]])
    def test_directions(self, directions):
        self.check(problem(k=len(directions)), directions=directions)

    @pytest.mark.parametrize("grid", [(1, 1), (1, 9), (9, 1), (3, 11), (12, 12)])
    def test_grids(self, grid):
        self.check(problem(grid), grid=grid)

    @pytest.mark.parametrize("merge", ["mean", "sum", None])
    @pytest.mark.parametrize("D", ["h", "h p"])
    def test_merge(self, merge, D):
        self.check(problem(D=D), merge=merge)

    @pytest.mark.parametrize("omitted", [("conv_weight", "conv_bias"), ("conv_bias",), ("D", "dt_bias")])
    def test_without_optional_arguments(self, omitted):
        self.check(without(problem(), *omitted))

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_dtypes(self, dtype):
        arrays = problem(dtype=dtype)
        assert self.scan(**arrays, grid=(5, 7), directions=ALL).dtype == dtype
        # Rounded to the dtype twice more: after the convolution, and before the directions are merged.
        self.bounds = {dtype: 2 * BOUNDS[dtype]}
        self.check(arrays, dtype=dtype)

    def test_dt_limit_and_chunk_size(self):
        self.check(problem(), dt_limit=(0.05, 0.2), chunk_size=8)

    def test_against_flips_and_transposes(self):
        """Each direction is `ssd` on the grid flipped or transposed as its name says, and back again."""
        rows, columns = 5, 7
        arrays = without(problem((rows, columns)), "conv_weight", "conv_bias")
        y = self.scan(**arrays, grid=(rows, columns), directions=ALL, merge=None, dt_softplus=True)
        for k, (transposed, reversed_) in enumerate([(False, False), (False, True), (True, False), (True, True)]):

            def there(a, transposed=transposed, reversed_=reversed_):
                image = a.reshape(2, rows, columns, *a.shape[2:])
                walk = (image.swapaxes(1, 2) if transposed else image).reshape(a.shape)
                return np.flip(walk, 1) if reversed_ else walk

            def back(a, transposed=transposed, reversed_=reversed_):
                walk = np.flip(a, 1) if reversed_ else a
                shape = (2, columns, rows) if transposed else (2, rows, columns)
                image = walk.reshape(*shape, *a.shape[2:])
                return (image.swapaxes(1, 2) if transposed else image).reshape(a.shape)

            walked = {name: there(arrays[name]) for name in ("x", "dt", "B", "C")}
            own = {name: arrays[name][k] for name in ("A", "D", "dt_bias")}
            expected = jitted(pk.ssd, **walked, **own, dt_softplus=True, implementation="reference")
            assert_close(named(y[k], "y"), named(back(np.asarray(expected)), "y"), self.bounds["float32"])
