"""The convolution backends, and their oracle against NumPy."""

import functools

import jax
import numpy as np
import pytest

import pallas_kernels as pk
from tests.kernels.causal_conv1d_suite import CausalConv1DSuite, problem
from tests.kernels.compare import assert_close, exactly, on_device, outputs_and_gradients


class TestXLA(CausalConv1DSuite):
    implementation = "xla"


def convolution(x, weight, bias, initial_state, segment_ids):
    """Each token looks back by hand: stops at another sequence, skips to zero on padding, goes on into the state."""
    batch, length, _ = x.shape
    width = weight.shape[1]
    real = segment_ids >= 0
    number = np.zeros((batch, length), int)
    for b in range(batch):
        current, count = None, 0
        for t in range(length):
            if real[b, t]:
                count += current is not None and segment_ids[b, t] != current
                current = segment_ids[b, t]
            number[b, t] = count
    y = np.zeros_like(x)
    for b in range(batch):
        for t in np.flatnonzero(real[b]):
            total = bias.copy()
            for back in range(width):
                source = t - back
                if source < 0:
                    value = initial_state[b, source] if number[b, t] == 0 else 0
                else:
                    value = x[b, source] if real[b, source] and number[b, source] == number[b, t] else 0
                total += weight[:, width - 1 - back] * value
            y[b, t] = total / (1 + np.exp(-total))
    return y


@pytest.mark.parametrize("width", [1, 2, 4])
def test_reference_against_numpy(width):
    arrays = {name: a.astype(np.float64) for name, a in problem(b=3, l=18, w=width).items()}
    packed = np.repeat([-1, 4, -2, 4, 0, 9], 3), np.repeat([1, 2, 3, 1, -1, 1], [2, 1, 5, 6, 2, 2])
    ids = np.stack([np.zeros(18), *packed]).astype(np.int32)
    (actual,) = exactly(pk.causal_conv1d, **arrays, segment_ids=ids, activation="silu")
    np.testing.assert_allclose(actual, convolution(**arrays, segment_ids=ids), rtol=1e-12, atol=1e-12)


def test_step_gradient():
    arrays = {name: a[:, 0] if name == "x" else a for name, a in problem(l=1).items()}
    arrays["state"] = arrays.pop("initial_state")
    actual = outputs_and_gradients(functools.partial(pk.causal_conv1d_step, activation="silu"), arrays)

    def whole(state, x, **rest):
        y, state = pk.causal_conv1d(
            x[:, None],
            **rest,
            initial_state=state,
            activation="silu",
            return_final_state=True,
            implementation="xla",  # the reference is made of this very step
        )
        return y[:, 0], state

    for a, e in zip(actual, outputs_and_gradients(whole, arrays, "float64"), strict=True):
        assert_close(a, e, 5e-5)


def test_step_keeps_the_dtype_of_the_state():
    arrays = on_device(problem())
    step = functools.partial(pk.causal_conv1d_step, weight=arrays["weight"])
    for state_dtype, dtype in (("bfloat16", "float32"), ("float32", "bfloat16")):
        y, state = jax.eval_shape(step, arrays["initial_state"].astype(state_dtype), arrays["x"][:, 0].astype(dtype))
        assert y.dtype == dtype and state.dtype == state_dtype


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"weight": np.zeros((5, 4), np.float32)}, r"weight: got shape \(5, 4\), expected \[c w\] = \(6, 4\)"),
        ({"bias": np.zeros(5, np.float32)}, r"bias: got shape"),
        (
            {"initial_state": np.zeros((2, 4, 6), np.float32)},
            r"initial_state: got shape \(2, 4, 6\), expected",
        ),
        ({"x": np.zeros((2, 0, 6), np.float32)}, "at least one token"),
        ({"x": np.zeros((2, 6), np.float32)}, r"x: got shape \(2, 6\), expected \[b l c\]"),
        ({"segment_ids": np.zeros((2, 20), np.int32)}, r"segment_ids: got shape"),
        ({"activation": "relu"}, "activation: got 'relu', expected 'silu' or None"),
    ],
)
def test_wrong_arguments(changes, message, unchecked):
    with pytest.raises(ValueError, match=message):
        unchecked(pk.causal_conv1d)(**problem() | changes)
    if "initial_state" in changes:
        with pytest.raises(ValueError, match=r"^state: got shape"):
            unchecked(pk.causal_conv1d_step)(changes["initial_state"], problem()["x"][:, 0], problem()["weight"])
