"""Every case a backend of `mamba2_step` has to pass; used like `ssd_suite`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from tests.kernels.compare import BOUNDS, Arrays, assert_close, exactly, jitted, named, outputs_and_gradients
from tests.kernels.ssd_step_suite import assert_nothing_is_copied, assert_overwritten
from tests.kernels.ssd_suite import without

OUTPUTS = ("y", "conv_state", "ssm_state")


def problem(b=2, h=4, p=8, n=8, g=2, w=4, *, dtype="float32", D="h", seed=0) -> Arrays:
    """Every array argument of `mamba2_step`; zxbcdt and the convolution state in `dtype`, the others float32."""
    rng = np.random.default_rng(seed)
    inner, channels = h * p, h * p + 2 * g * n

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    arrays = {
        "conv_state": normal(b, w - 1, channels),
        "ssm_state": normal(b, h, p, n),
        "zxbcdt": normal(b, inner + channels + h),
        "conv_weight": normal(channels, w),
        "A": -rng.uniform(0.5, 4, h).astype(np.float32),
        "conv_bias": normal(channels),
        "D": normal(h) if D == "h" else normal(h, p),
        "dt_bias": rng.uniform(-4, -1, h).astype(np.float32),
        "norm_weight": 1 + 0.1 * normal(inner),
    }
    return {name: a.astype(jnp.dtype(dtype)) if name in ("conv_state", "zxbcdt") else a for name, a in arrays.items()}


class Mamba2StepSuite:
    implementation: str
    bounds = BOUNDS
    sizes: dict[str, int] = {}  # noqa: RUF012, of cases about something else
    shapes = ((1, 1, 128, 64, 1, 4), (3, 6, 64, 64, 3, 2), (2, 2, 128, 256, 1, 3), (1, 8, 16, 128, 1, 4))
    """b, h, p, n, g, w"""
    copies_nothing = False

    def step(self, **options):
        return jitted(pk.mamba2_step, implementation=self.implementation, **options)

    def check(self, arrays: Arrays, *, dtype="float32", **options):
        actual = self.step(**arrays, **options)
        assert [a.dtype for a in actual] == [dtype, arrays["conv_state"].dtype, arrays["ssm_state"].dtype]
        expected = named(exactly(pk.mamba2_step, **arrays, **options), *OUTPUTS)
        assert_close(named(actual, *OUTPUTS), expected, self.bounds[dtype])
        np.testing.assert_array_equal(np.asarray(actual[1], np.float64), expected["conv_state"])  # moved, not computed

    def arrays(self, **sizes) -> Arrays:
        return problem(**self.sizes | sizes)

    def test_shapes(self):
        for b, h, p, n, g, w in self.shapes:
            self.check(self.arrays(b=b, h=h, p=p, n=n, g=g, w=w))

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    @pytest.mark.parametrize("norm_before_gate", [False, True])
    def test_dtypes(self, dtype, norm_before_gate):
        self.check(self.arrays(dtype=dtype, D="h p"), dtype=dtype, norm_before_gate=norm_before_gate)

    @pytest.mark.parametrize(
        "omitted",
        [("conv_bias",), ("D",), ("dt_bias",), ("norm_weight",), ("conv_bias", "D", "dt_bias", "norm_weight")],
    )
    def test_without_optional_arguments(self, omitted):
        self.check(without(self.arrays(), *omitted))

    def test_dt_limit(self):
        self.check(self.arrays(), dt_limit=(0.05, 0.2))

    def test_norm_eps(self):
        self.check(self.arrays(), norm_eps=3.0)

    def test_low_precision_state(self):
        arrays = self.arrays()
        arrays["ssm_state"] = arrays["ssm_state"].astype(jnp.bfloat16)
        y, _, state = self.step(**arrays)
        exact = named(exactly(pk.mamba2_step, **arrays), *OUTPUTS)
        assert state.dtype == jnp.bfloat16
        assert_close(named(y, "y"), {"y": exact["y"]}, self.bounds["float32"])
        assert_close(named(state, "ssm_state"), {"ssm_state": exact["ssm_state"]}, 2**-8)

    def test_gradient(self):
        arrays = self.arrays()
        actual = outputs_and_gradients(self.step, arrays)
        truth = functools.partial(pk.mamba2_step, implementation="reference")
        for a, e in zip(actual, outputs_and_gradients(truth, arrays, "float64"), strict=True):
            assert_close(a, e, self.bounds["float32"])

    def test_steps_equal_the_scan(self):
        """A sequence token by token equals convolution, scan and norm of the whole, from the same states."""
        length = 19
        arrays = self.arrays()
        rng = np.random.default_rng(1)
        batch, heads, head_dim, state_size = arrays["ssm_state"].shape
        tokens = rng.normal(size=(batch, length, arrays["zxbcdt"].shape[1])).astype(np.float32)
        shared = without(arrays, "zxbcdt", "conv_state", "ssm_state")

        def token(states, zxbcdt):
            y, *states = self.step(conv_state=states[0], ssm_state=states[1], zxbcdt=zxbcdt, **shared)
            return tuple(states), y

        states = (jnp.asarray(arrays["conv_state"]), jnp.asarray(arrays["ssm_state"]))
        states, y = jax.lax.scan(token, states, jnp.moveaxis(jnp.asarray(tokens), 1, 0))
        actual = named((np.moveaxis(np.asarray(y), 0, 1), *states), *OUTPUTS)

        inner = heads * head_dim
        z, xBC, dt = np.split(tokens, [inner, tokens.shape[2] - heads], axis=-1)
        xBC, conv_state = exactly(
            pk.causal_conv1d,
            x=xBC,
            weight=arrays["conv_weight"],
            bias=arrays["conv_bias"],
            initial_state=arrays["conv_state"],
            activation="silu",
            return_final_state=True,
        )
        groups = (xBC.shape[-1] - inner) // (2 * state_size)
        x, B, C = np.split(xBC, [inner, inner + groups * state_size], axis=-1)
        y, ssm_state = exactly(
            pk.ssd,
            x=x.reshape(batch, length, heads, head_dim),
            dt=dt,
            A=arrays["A"],
            B=B.reshape(batch, length, groups, state_size),
            C=C.reshape(batch, length, groups, state_size),
            D=arrays["D"],
            dt_bias=arrays["dt_bias"],
            dt_softplus=True,
            initial_state=arrays["ssm_state"],
            return_final_state=True,
        )
        (y,) = exactly(
            pk.gated_rms_norm,
            x=y.reshape(z.shape),
            z=z,
            weight=arrays["norm_weight"],
            eps=1e-5,
            group_size=inner // groups,
        )
        assert_close(actual, named((y, conv_state, ssm_state), *OUTPUTS), self.bounds["float32"])

    def test_one_layer_of_a_stack(self):
        arrays = self.arrays()
        rng = np.random.default_rng(2)
        states = ("conv_state", "ssm_state")
        stacks = {name: rng.normal(size=(3, *arrays[name].shape)).astype(np.float32) for name in states}
        for layer in range(3):
            actual = self.step(**arrays | stacks, layer=np.asarray(layer, np.int32))
            alone = self.step(**arrays | {name: stacks[name][layer] for name in states})
            np.testing.assert_array_equal(actual[0], alone[0])
            for name, stack, a in zip(states, actual[1:], alone[1:], strict=True):
                np.testing.assert_array_equal(stack[layer], a)
                others = np.arange(3) != layer
                np.testing.assert_array_equal(np.asarray(stack)[others], stacks[name][others])

    @pytest.mark.parametrize("stacked", [False, True])
    def test_rows_that_are_not_active_keep_their_states(self, stacked):
        """Whatever their token, even NaN; the others are not disturbed."""
        arrays = self.arrays(b=3)
        y, *states = self.step(**arrays)
        active = np.array([True, False, True])
        arrays["zxbcdt"][1] = np.nan
        before = {name: arrays[name] for name in ("conv_state", "ssm_state")}
        if stacked:
            arrays |= {name: np.stack([before[name]] * 2) for name in before} | {"layer": np.asarray(1, np.int32)}
        actual_y, *actual = self.step(**arrays, active=active)
        np.testing.assert_array_equal(np.asarray(actual_y)[active], np.asarray(y)[active])
        for name, new, a in zip(before, states, actual, strict=True):
            a = np.asarray(a)[1] if stacked else np.asarray(a)
            np.testing.assert_array_equal(a[1], before[name][1])
            np.testing.assert_array_equal(a[active], np.asarray(new)[active])

    def test_bit_identical_on_repetition(self):
        arrays = self.arrays(dtype="bfloat16")
        for a, b in zip(self.step(**arrays), self.step(**arrays), strict=True):
            np.testing.assert_array_equal(a, b)

    @pytest.mark.parametrize("stacked", [False, True])
    @pytest.mark.parametrize("masked", [False, True])
    def test_donated_states_are_overwritten(self, stacked, masked):
        arrays = {name: jnp.asarray(a) for name, a in self.arrays().items()}
        if masked:
            arrays["active"] = jnp.arange(len(arrays["zxbcdt"])) > 0
        if stacked:
            arrays |= {name: jnp.stack([arrays[name]] * 3) for name in ("conv_state", "ssm_state")}
            arrays["layer"] = jnp.asarray(1, jnp.int32)
        assert_overwritten(self.step, arrays, "conv_state", "ssm_state")
        if self.copies_nothing:
            assert_nothing_is_copied(self.step, arrays, "conv_state", "ssm_state")
