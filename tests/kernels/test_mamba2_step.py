"""The Mamba-2 mixer's step: its parts in one call, and what callers are told when shapes do not fit."""

import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from tests.kernels.compare import BOUNDS, assert_close, jitted, named
from tests.kernels.mamba2_step_suite import Mamba2StepSuite, problem
from tests.kernels.ssd_suite import without


class TestXLA(Mamba2StepSuite):
    implementation = "xla"


def parts(
    conv_state,
    ssm_state,
    zxbcdt,
    conv_weight,
    A,
    *,
    conv_bias,
    D,
    dt_bias,
    norm_weight=None,
    norm_eps=1e-5,
    norm_before_gate=False,
    **dt_limit,
):
    """The three public functions one after the other, for the default sizes of `problem`."""
    b, h, p, n, g = 2, 4, 8, 8, 2
    z, xBC, dt = jnp.split(zxbcdt, [h * p, 2 * h * p + 2 * g * n], axis=-1)
    xBC, conv_state = pk.causal_conv1d_step(conv_state, xBC, conv_weight, conv_bias, activation="silu")
    x, B, C = jnp.split(xBC, [h * p, h * p + g * n], axis=-1)
    x, B, C = x.reshape(b, h, p), B.reshape(b, g, n), C.reshape(b, g, n)
    gate = {"z": z.reshape(x.shape)} if norm_weight is None else {}
    y, ssm_state = pk.ssd_step(ssm_state, x, dt, A, B, C, D=D, dt_bias=dt_bias, dt_softplus=True, **dt_limit, **gate)
    y = y.reshape(z.shape)
    if norm_weight is not None:
        options = {"eps": norm_eps, "group_size": h * p // g, "norm_before_gate": norm_before_gate}
        y = pk.gated_rms_norm(y, z, norm_weight, **options)
    return y, conv_state, ssm_state


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("options", [{}, {"norm_before_gate": True}, {"norm_eps": 3.0}, {"dt_limit": (0.05, 0.2)}])
def test_same_as_its_parts(dtype, options, implementation):
    arrays = problem(dtype=dtype)
    whole = jitted(pk.mamba2_step, **arrays, **options, implementation=implementation)
    for a, b in zip(whole, jitted(parts, **arrays, **options), strict=True):
        if implementation == "xla":
            np.testing.assert_array_equal(a, b)
        else:
            assert_close(named(a, "a"), named(b, "a"), BOUNDS[dtype])


def test_without_norm_there_is_only_the_gate():
    arrays = without(problem(), "norm_weight")
    actual, expected = jitted(pk.mamba2_step, **arrays), jitted(parts, **arrays)
    assert_close(named(actual, *"abc"), named(expected, *"abc"), BOUNDS["float32"])


@pytest.mark.parametrize(
    "name, shape, message",
    [
        ("zxbcdt", (2, 99), r"zxbcdt: got shape \(2, 99\), expected \[b 2\*h\*p\+2\*g\*n\+h\] = \(2, 100\)"),
        ("conv_state", (2, 2, 64), r"conv_state: got shape \(2, 2, 64\), expected \[b w-1 c\] = \(2, 3, 64\)"),
        ("conv_weight", (63, 4), r"conv_weight: got 63 channels, expected h\*p \+ 2\*g\*n = 32 \+ 16\*g for groups g"),
        ("conv_weight", (80, 4), r"conv_weight: got 80 channels, expected .* that divide 4 heads"),
        ("conv_weight", (32, 4), r"conv_weight: got 32 channels"),
        ("A", (5,), r"A: got shape"),
        ("conv_bias", (65,), r"conv_bias: got shape"),
        ("D", (4, 9), r"D: got shape \(4, 9\), expected \[h p\] = \(4, 8\)"),
        ("dt_bias", (3,), r"dt_bias: got shape"),
        ("norm_weight", (4, 8), r"norm_weight: got shape"),
        ("ssm_state", (2, 32, 8), r"ssm_state: got shape \(2, 32, 8\), expected \[b h p n\]"),
    ],
)
def test_wrong_shapes(name, shape, message, unchecked):
    with pytest.raises(ValueError, match=message):
        unchecked(pk.mamba2_step)(**problem() | {name: np.zeros(shape, np.float32)})


def test_wrong_stacks(unchecked):
    arrays = problem()
    stack = {name: np.stack([arrays[name]] * 3) for name in ("conv_state", "ssm_state")}
    with pytest.raises(ValueError, match=r"ssm_state: got shape \(3, 2, 4, 8, 8\), expected \[b h p n\]"):
        unchecked(pk.mamba2_step)(**arrays | stack)
    layer = np.asarray(0, np.int32)
    with pytest.raises(ValueError, match=r"ssm_state: got shape \(2, 4, 8, 8\), expected \[layers b h p n\]"):
        unchecked(pk.mamba2_step)(**arrays, layer=layer)
    with pytest.raises(ValueError, match=r"conv_state: got shape .* expected \[layers b w-1 c\] = \(3, 2, 3, 64\)"):
        unchecked(pk.mamba2_step)(**arrays | stack | {"conv_state": stack["conv_state"][:2]}, layer=layer)
