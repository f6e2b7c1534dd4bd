"""The SSD backends against the float64 recurrence, and what only the chunked XLA backend promises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.extend.core.primitives import dot_general_p
from jax.lax import Precision

import pallas_kernels as pk
from tests.kernels.ssd_step_suite import SSDStepSuite, one_token
from tests.kernels.ssd_suite import SSDSuite, problem


class TestXLA(SSDSuite):
    implementation = "xla"


class TestXLAStep(SSDStepSuite):
    implementation = "xla"


def equations(jaxpr):
    """All equations of a jaxpr, those inside scans, calls and checkpoints included."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)


def largest_array(jaxpr) -> int:
    """Elements of the largest intermediate."""
    return max(variable.aval.size for equation in equations(jaxpr) for variable in equation.outvars)


def gradient_jaxpr(**sizes):
    arrays = {name: jnp.asarray(a) for name, a in problem(**sizes).items()}

    def loss(arrays):
        y, state = pk.ssd(**arrays, dt_softplus=True, chunk_size=32, return_final_state=True, implementation="xla")
        return jnp.sum(y**2) + jnp.sum(state**2)

    return jax.make_jaxpr(jax.grad(loss))(arrays).jaxpr


def test_one_chunk_of_weights_at_a_time():
    b, l, h, q = 2, 512, 4, 32  # noqa: E741, the axis letter
    largest = largest_array(gradient_jaxpr(b=b, l=l, h=h, p=2, n=2, g=1))
    assert b * h * q * q <= largest < 2 * b * h * q * q  # one chunk's weights, which are there to be found; not two


def test_groups_are_not_repeated_to_heads():
    h, q, n = 8, 32, 512
    largest = largest_array(gradient_jaxpr(b=1, l=4 * q, h=h, p=4, n=n, g=1))
    assert largest < h * q * n  # not even inside one chunk


@pytest.mark.parametrize("dtype, expected", [("float32", Precision.HIGHEST), ("bfloat16", None)])
def test_float32_is_not_multiplied_in_less(dtype, expected):
    """On CPU the precision changes nothing; a GPU would use TF32, a TPU bfloat16."""
    arrays = {name: jnp.asarray(a) for name, a in problem(dtype=dtype).items()}
    jaxpr = jax.make_jaxpr(lambda arrays: pk.ssd(**arrays, implementation="xla"))(arrays).jaxpr
    precisions = [equation.params["precision"] for equation in equations(jaxpr) if equation.primitive is dot_general_p]
    assert precisions and all(p == (None if expected is None else (expected, expected)) for p in precisions)
    jaxpr = jax.make_jaxpr(lambda arrays: pk.ssd(**arrays, precision="default", implementation="xla"))(arrays).jaxpr
    assert "HIGHEST" not in str(jaxpr)


def test_forward_mode():
    arrays = {name: jnp.asarray(a) for name, a in problem(l=40).items()}
    x, rest = arrays["x"], {name: a for name, a in arrays.items() if name != "x"}
    scan = lambda x: pk.ssd(x, **rest, dt_softplus=True, implementation="xla")  # noqa: E731
    _, derivative = jax.jvp(scan, (x,), (x,))
    zero = scan(jnp.zeros_like(x))  # the scan is affine in x
    np.testing.assert_allclose(derivative, scan(x) - zero, atol=1e-4)


@pytest.mark.parametrize(
    "name, shape, message",
    [
        ("dt", (2, 37, 3), r"dt: got shape \(2, 37, 3\), expected \[b l h\] = \(2, 37, 4\)"),
        ("A", (5,), r"A: got shape \(5,\), expected \[h\] = \(4,\)"),
        ("C", (2, 37, 2, 9), r"C: got shape"),
        ("D", (4, 9), r"D: got shape \(4, 9\), expected \[h p\] = \(4, 8\)"),
        ("z", (2, 36, 4, 8), r"z: got shape"),
        ("dt_bias", (3,), r"dt_bias: got shape"),
        ("initial_state", (2, 4, 8, 7), r"initial_state: got shape"),
        ("x", (2, 37, 32), r"x: got shape \(2, 37, 32\), expected \[b l h p\]"),
    ],
)
def test_wrong_shapes(name, shape, message, unchecked):
    with pytest.raises(ValueError, match=message):
        unchecked(pk.ssd)(**problem() | {name: np.zeros(shape, np.float32)})


def test_wrong_values(unchecked):
    with pytest.raises(ValueError, match="heads: got 4, expected a multiple of groups = 3"):
        unchecked(pk.ssd)(**problem(g=3))
    with pytest.raises(ValueError, match="chunk_size: got 0, expected at least 1"):
        unchecked(pk.ssd)(**problem(), chunk_size=0)
    with pytest.raises(ValueError, match="at least one token"):
        unchecked(pk.ssd)(**problem(l=0))
    with pytest.raises(ValueError, match="segment_ids: got shape"):
        unchecked(pk.ssd)(**problem(), segment_ids=np.zeros((2, 36), np.int32))
    token = one_token(problem())
    with pytest.raises(ValueError, match="state: got shape"):
        unchecked(pk.ssd_step)(**token | {"state": token["state"][:, :, :, 1:]})
