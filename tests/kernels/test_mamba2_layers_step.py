"""A token through all layers: what callers are told when shapes do not fit, and a mixer's step layer by layer."""

import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from tests.kernels.compare import BOUNDS, assert_close, jitted, named
from tests.kernels.mamba2_layers_step_suite import OUTPUTS, Mamba2LayersStepSuite, problem, quantized


class TestXLA(Mamba2LayersStepSuite):
    implementation = "xla"


def layer_by_layer(residual, conv_state, ssm_state, in_norm_weight, in_proj, conv_weight, A, out_proj, **others):
    states = []
    for layer in range(len(in_proj)):
        scale = 1 / jnp.sqrt(jnp.mean(residual**2, axis=1, keepdims=True) + 1e-5)
        zxbcdt = (residual * scale * in_norm_weight[layer][None]) @ in_proj[layer]
        own = {name: a[layer] for name, a in others.items()}
        y, *after = pk.mamba2_step(conv_state[layer], ssm_state[layer], zxbcdt, conv_weight[layer], A[layer], **own)
        residual = residual + y @ out_proj[layer]
        states.append(after)
    return residual, *(jnp.stack(a) for a in zip(*states, strict=True))


def test_same_as_one_layer_after_the_other():
    arrays = problem(layers=5)
    actual, expected = jitted(pk.mamba2_layers_step, **arrays), jitted(layer_by_layer, **arrays)
    assert_close(named(actual, *"abc"), named(expected, *"abc"), BOUNDS["float32"])


@pytest.mark.parametrize(
    "name, shape, message",
    [
        ("residual", (3, 24), r"residual: got shape \(3, 24\), expected \[b d\] = \(2, 24\)"),
        ("in_norm_weight", (2, 23), r"in_norm_weight: got shape \(2, 23\), expected \[layers d\] = \(2, 24\)"),
        ("in_proj", (2, 24, 99), r"in_proj: got shape .*, expected \[layers d 2\*h\*p\+2\*g\*n\+h\] = \(2, 24, 100\)"),
        ("out_proj", (2, 32, 25), r"out_proj: got shape .* = \(2, 32, 24\)"),
        ("conv_state", (3, 2, 3, 64), r"conv_state: got shape .* = \(2, 2, 3, 64\)"),
        ("conv_weight", (3, 64, 4), r"conv_weight: got shape"),
        ("A", (2, 5), r"A: got shape"),
        ("conv_bias", (2, 65), r"conv_bias: got shape"),
        ("D", (2, 4, 9), r"D: got shape \(2, 4, 9\), expected \[layers h p\] = \(2, 4, 8\)"),
        ("dt_bias", (2, 3), r"dt_bias: got shape"),
        ("norm_weight", (2, 31), r"norm_weight: got shape"),
        ("ssm_state", (2, 4, 8, 8), r"ssm_state: got shape \(2, 4, 8, 8\), expected \[layers b h p n\]"),
    ],
)
def test_wrong_shapes(name, shape, message, unchecked):
    with pytest.raises(ValueError, match=message):
        unchecked(pk.mamba2_layers_step)(**problem() | {name: np.zeros(shape, np.float32)})


def test_quantized_projections_are_those_times_their_scales():
    arrays = quantized(problem())
    weights = {name: arrays[name] * arrays.pop(f"{name}_scale")[:, None] for name in ("in_proj", "out_proj")}
    actual = jitted(pk.mamba2_layers_step, **quantized(problem()))
    expected = jitted(pk.mamba2_layers_step, **arrays | weights)
    assert_close(named(actual, *OUTPUTS), named(expected, *OUTPUTS), BOUNDS["float32"])


def test_int8_without_a_scale(unchecked):
    arrays = quantized(problem())
    del arrays["out_proj_scale"]
    with pytest.raises(ValueError, match="out_proj: got int8, expected out_proj_scale with it"):
        unchecked(pk.mamba2_layers_step)(**arrays)
