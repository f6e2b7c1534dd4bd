"""Every case a backend of `causal_conv1d` has to pass; used like `ssd_suite`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from tests.kernels.compare import (
    BOUNDS,
    Arrays,
    assert_close,
    exactly,
    jitted,
    named,
    on_device,
    outputs_and_gradients,
)


def problem(b=2, l=21, c=6, w=4, *, dtype="float32", seed=0) -> Arrays:  # noqa: E741, the axis letter
    """Every array argument with a gradient: x and the state in `dtype`, weight and bias float32."""
    rng = np.random.default_rng(seed)
    shapes = {"x": (b, l, c), "weight": (c, w), "bias": (c,), "initial_state": (b, w - 1, c)}
    arrays = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    low = jnp.dtype(dtype)
    return {name: a.astype(low) if name in ("x", "initial_state") else a for name, a in arrays.items()}


def without(arrays: Arrays, *names: str) -> Arrays:
    return {name: a for name, a in arrays.items() if name not in names}


class CausalConv1DSuite:
    implementation: str
    bounds = BOUNDS

    def conv(self, **options):
        return jitted(pk.causal_conv1d, implementation=self.implementation, **options)

    def check(self, arrays: Arrays, *, dtype="float32", **options):
        options = {"activation": "silu", "return_final_state": True} | on_device(options)
        actual = outputs_and_gradients(functools.partial(self.conv, **options), arrays)
        truth = functools.partial(pk.causal_conv1d, implementation="reference", **options)
        expected = outputs_and_gradients(truth, arrays, "float64")
        for a, e in zip(actual, expected, strict=True):
            assert_close(a, e, self.bounds[dtype])

    # causal-conv1d, tests/test_causal_conv1d.py: lengths, widths, bias, SiLU, dtypes, states; a cover.
    @pytest.mark.parametrize("length", [1, 2, 8, 16, 129, 372, 1134])
    def test_lengths(self, length):
        self.check(problem(l=length))

    @pytest.mark.parametrize("width", [1, 2, 3, 4])
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    def test_widths_and_dtypes(self, width, dtype):
        arrays = problem(w=width, dtype=dtype)
        y, state = self.conv(**arrays, return_final_state=True)
        assert y.dtype == state.dtype == dtype
        self.check(arrays, dtype=dtype)

    @pytest.mark.parametrize("omitted", [(), ("bias",), ("initial_state",), ("bias", "initial_state")])
    @pytest.mark.parametrize("activation", [None, "silu"])
    def test_options(self, omitted, activation):
        self.check(without(problem(), *omitted), activation=activation, return_final_state=not omitted)

    def test_many_channels(self):
        self.check(problem(b=1, l=30, c=4128))

    def test_segments(self):
        ids = np.stack(
            [
                np.repeat([-1, 5, 2, -3, 5, -1], [3, 4, 1, 2, 8, 3]),
                np.repeat([0, 1, 2, 0, 7, 8], [6, 1, 1, 2, 2, 9]),
                np.repeat([3, -1, 4, 5], [9, 10, 1, 1]),
                np.full(21, -1),
            ]
        ).astype(np.int32)
        self.check(problem(b=4, l=21), segment_ids=ids)

    def test_packed_row_equals_separate_sequences(self):
        arrays = problem(b=1, l=20)
        lengths = (9, 1, 2, 8)
        y, state = self.conv(**arrays, segment_ids=np.repeat([4, 5, 6, 4], lengths)[None], return_final_state=True)
        start, expected = 0, []
        for number, length in enumerate(lengths):
            alone = arrays | {"x": arrays["x"][:, start : start + length]}
            alone = without(alone, "initial_state") if number else alone
            outputs = exactly(pk.causal_conv1d, **alone, return_final_state=True)
            expected.append(outputs[0])
            start += length
        expected = (np.concatenate(expected, axis=1), outputs[1])
        assert_close(named((y, state), "y", "state"), named(expected, "y", "state"), self.bounds["float32"])

    def test_padding_is_zero_and_leaves_the_state(self):
        arrays = problem(b=1, l=12)
        ids = np.array([[0] * 7 + [-1] * 5])
        y, state = self.conv(**arrays, segment_ids=ids, return_final_state=True)
        assert (np.asarray(y)[:, 7:] == 0).all()
        np.testing.assert_array_equal(state, arrays["x"][:, 4:7])

    @pytest.mark.parametrize("cuts", [(1,), (2, 3), (10,), (1, 2, 3, 4)])
    def test_pieces_equal_the_whole(self, cuts):
        arrays = problem()
        state, pieces = arrays["initial_state"], []
        for start, end in zip((0, *cuts), (*cuts, 21), strict=True):
            piece = arrays | {"x": arrays["x"][:, start:end], "initial_state": state}
            y, state = self.conv(**piece, return_final_state=True)
            pieces.append(np.asarray(y))
        expected = exactly(pk.causal_conv1d, **arrays, return_final_state=True)
        actual = (np.concatenate(pieces, axis=1), state)
        assert_close(named(actual, "y", "state"), named(expected, "y", "state"), self.bounds["float32"])

    # causal-conv1d, test_causal_conv1d_update: the state is moved, not computed, hence equal bit by bit.
    @pytest.mark.parametrize("tokens", [1, 4, 5])
    @pytest.mark.parametrize("width", [2, 3, 4])
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_steps_equal_the_sequence(self, tokens, width, dtype):
        arrays = problem(l=tokens, c=64, w=width, dtype=dtype)
        y, final = self.conv(**arrays, activation="silu", return_final_state=True)
        state, weight, bias = (jnp.asarray(arrays[name]) for name in ("initial_state", "weight", "bias"))
        for t in range(tokens):
            x = jnp.asarray(arrays["x"][:, t])
            y_t, state = pk.causal_conv1d_step(state, x, weight, bias, activation="silu")
            assert_close(named(y_t, "y"), named(y[:, t], "y"), self.bounds[dtype])
        np.testing.assert_array_equal(np.asarray(state, np.float32), np.asarray(final, np.float32))

    def test_bit_identical_on_repetition(self):
        arrays = problem(l=200, dtype="bfloat16")
        function = functools.partial(self.conv, activation="silu", return_final_state=True)
        first, second = (outputs_and_gradients(function, arrays) for _ in range(2))
        for a, b in zip(first, second, strict=True):
            for name in a:
                np.testing.assert_array_equal(a[name], b[name])

    def test_float32_accumulation(self):
        """Large terms that cancel: summed in bfloat16 the small one would be lost."""
        x = np.array([256, 1, -256], np.float32).astype(jnp.bfloat16)[None, :, None]
        y = self.conv(x=x, weight=np.ones((1, 3), np.float32))
        assert jax.device_get(y)[0, 2, 0] == 1
