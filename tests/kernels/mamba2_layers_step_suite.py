"""Every case a backend of `mamba2_layers_step` has to pass; used like `ssd_suite`."""

import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from tests.kernels.compare import BOUNDS, Arrays, assert_as_exact, assert_close, exactly, jitted, named
from tests.kernels.ssd_suite import without

OUTPUTS = ("residual", "conv_state", "ssm_state")
MOVED = ("conv_state", "in_proj", "out_proj")


def problem(layers=2, b=2, d=24, h=4, p=8, n=8, g=2, w=4, *, dtype="float32", D="h", seed=0) -> Arrays:
    """Every array argument of `mamba2_layers_step`; projections and convolution state in `dtype`, others float32."""
    rng = np.random.default_rng(seed)
    inner, channels = h * p, h * p + 2 * g * n

    def normal(*shape, scale=1.0):
        return (scale * rng.normal(size=shape)).astype(np.float32)

    projected = inner + channels + h
    arrays = {
        "residual": normal(b, d),
        "conv_state": normal(layers, b, w - 1, channels),
        "ssm_state": normal(layers, b, h, p, n),
        "in_norm_weight": 1 + 0.1 * normal(layers, d),
        "in_proj": normal(layers, d, projected, scale=d**-0.5),
        "conv_weight": normal(layers, channels, w, scale=0.5),
        "A": -rng.uniform(0.5, 4, (layers, h)).astype(np.float32),
        "out_proj": normal(layers, inner, d, scale=inner**-0.5),
        "conv_bias": normal(layers, channels),
        "D": normal(layers, h) if D == "h" else normal(layers, h, p),
        "dt_bias": rng.uniform(-4, -1, (layers, h)).astype(np.float32),
        "norm_weight": 1 + 0.1 * normal(layers, inner),
    }
    return {name: a.astype(jnp.dtype(dtype)) if name in MOVED else a for name, a in arrays.items()}


def quantized(arrays: Arrays) -> Arrays:
    """The same with projections in int8, and their scales."""
    arrays = dict(arrays)
    for name in ("in_proj", "out_proj"):
        weights = arrays[name].astype(np.float32)
        scale = np.abs(weights).max(axis=1) / 127
        arrays[name] = np.rint(weights / scale[:, None]).astype(np.int8)
        arrays[f"{name}_scale"] = scale
    return arrays


class Mamba2LayersStepSuite:
    implementation: str
    dtype = "float32"
    bounds = BOUNDS
    sizes: dict[str, int] = {}  # noqa: RUF012, of cases about something else
    shapes = ((1, 1, 16, 2, 16, 8, 1, 4), (6, 3, 24, 6, 4, 8, 3, 2))
    """layers, b, d, h, p, n, g, w"""

    def step(self, **options):
        return jitted(pk.mamba2_layers_step, implementation=self.implementation, **options)

    def arrays(self, **sizes) -> Arrays:
        return problem(**{"dtype": self.dtype} | self.sizes | sizes)

    def check(self, arrays: Arrays, **options):
        """As exact as the loop over layers, where that rounds; to rounding in float32."""
        actual = self.step(**arrays, **options)
        for a, name in zip(actual, OUTPUTS, strict=True):
            assert a.dtype == arrays[name].dtype and a.shape == arrays[name].shape
        exact = named(exactly(pk.mamba2_layers_step, **arrays, **options), *OUTPUTS)
        if self.dtype == "float32":
            assert_close(named(actual, *OUTPUTS), exact, self.bounds["float32"])
        else:
            other = jitted(pk.mamba2_layers_step, implementation="xla", **arrays, **options)
            assert_as_exact(named(actual, *OUTPUTS), named(other, *OUTPUTS), exact, self.dtype)

    def test_shapes(self):
        for layers, b, d, h, p, n, g, w in self.shapes:
            self.check(self.arrays(layers=layers, b=b, d=d, h=h, p=p, n=n, g=g, w=w))

    def test_residual_in_the_dtype_of_the_computation(self):
        arrays = self.arrays(D="h p")
        self.check(arrays | {"residual": arrays["residual"].astype(jnp.dtype(self.dtype))})

    @pytest.mark.parametrize("omitted", [("conv_bias",), ("conv_bias", "D", "dt_bias")])
    def test_without_optional_arguments(self, omitted):
        self.check(without(self.arrays(), *omitted))

    def test_options(self):
        self.check(self.arrays(), dt_limit=(0.05, 0.2), norm_eps=3.0, in_norm_eps=2.0)

    def test_quantized_projections(self):
        self.check(quantized(self.arrays()))

    def test_rows_that_are_not_active_keep_their_states(self):
        """Whatever their token, even NaN; the others are not disturbed."""
        arrays = self.arrays(b=3)
        residual, *states = self.step(**arrays)
        active = np.array([True, False, True])
        arrays["residual"][1] = np.nan
        actual_residual, *actual = self.step(**arrays, active=active)
        np.testing.assert_array_equal(np.asarray(actual_residual)[active], np.asarray(residual)[active])
        for name, new, a in zip(("conv_state", "ssm_state"), states, actual, strict=True):
            np.testing.assert_array_equal(np.asarray(a)[:, 1], arrays[name][:, 1])
            np.testing.assert_array_equal(np.asarray(a)[:, active], np.asarray(new)[:, active])

    def test_rows_do_not_depend_on_each_other(self):
        arrays = self.arrays(b=3)
        residual, *_ = self.step(**arrays)
        for row in range(3):
            alone = {name: arrays[name][:, row : row + 1] for name in ("conv_state", "ssm_state")}
            actual, *_ = self.step(**arrays | alone | {"residual": arrays["residual"][row : row + 1]})
            assert_close(named(actual, "row"), named(residual[row : row + 1], "row"), self.bounds[self.dtype])

    def test_bit_identical_on_repetition(self):
        arrays = self.arrays()
        for a, b in zip(self.step(**arrays), self.step(**arrays), strict=True):
            np.testing.assert_array_equal(a, b)
