"""A sequence in pieces on several devices against the same on one, and against the recurrence in float64."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import pallas_kernels as pk
from tests.kernels import causal_conv1d_suite
from tests.kernels.compare import BOUNDS, assert_close, exactly, named, outputs_and_gradients
from tests.kernels.ssd_suite import problem, without
from tests.kernels.test_mamba2_sequence import problem as mamba2_sequence_problem
from tests.kernels.test_sharded import ROUNDING, collectives, mesh_of

LENGTH = 48


def pieces(n: int, batch: int = 1, heads: int = 1):
    """The tokens in `n` pieces; batch and heads split as well. Tokens lie over two mesh axes where there are enough."""
    mesh = mesh_of(batch=batch, heads=heads, outer=min(n, 2), inner=n // min(n, 2))
    return pk.use_mesh(mesh, batch="batch", heads="heads", sequence=("outer", "inner"))


def rows(n: int) -> np.ndarray:
    """Rows of ids: runs of all lengths, many of which end where a piece does; padding of several pieces."""
    rng = np.random.default_rng(n)
    piece = LENGTH // n
    drawn = [
        np.repeat(rng.integers(-1, 3, LENGTH), rng.choice([1, 2, piece, piece + 1, 2 * piece], LENGTH))[:LENGTH]
        for _ in range(60)
    ]
    first, last = np.arange(LENGTH) < piece, np.arange(LENGTH) >= LENGTH - piece
    chosen = [
        np.zeros(LENGTH),  # one sequence
        np.full(LENGTH, -1),  # nothing
        np.where(first, -1, 5),
        np.where(last, -1, 5),
        np.where(first, 5, -1),
        np.where(last, 5, -1),
        np.where(first, 4, np.where(last, 4, -1)),  # goes on after padding
        np.where(first, 4, np.where(last, 5, -1)),
    ]
    return np.stack(drawn + chosen).astype(np.int32)


def compiled(function):
    """(outputs, gradients) of `function(ids, **arrays)`, compiled once for all ids. Cotangents are random."""

    @jax.jit
    def run(ids, arrays):
        outputs, pullback = jax.vjp(lambda arrays: function(segment_ids=ids, **arrays), arrays)
        keys = jax.random.split(jax.random.key(0), len(outputs))
        cotangents = tuple(jax.random.normal(k, a.shape, a.dtype) for k, a in zip(keys, outputs, strict=True))
        return dict(enumerate(outputs)), pullback(cotangents)[0]

    return lambda ids, arrays: jax.tree.map(np.asarray, run(ids, arrays))


OPS = {
    "ssd": functools.partial(pk.ssd, dt_softplus=True, return_final_state=True, chunk_size=7),
    "causal_conv1d": functools.partial(pk.causal_conv1d, activation="silu", return_final_state=True),
}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("n", [8])
def test_packed_rows(op, n):
    """Sequences that go on over a boundary, that end there, and padding everywhere; four rows at a time."""
    arrays = problem(b=4, l=LENGTH, h=2, g=1, p=4, n=4) if op == "ssd" else causal_conv1d_suite.problem(b=4, l=LENGTH)
    arrays = {name: jnp.asarray(a) for name, a in arrays.items()}

    def split(**arrays):
        with pieces(n):
            return OPS[op](**arrays)

    split, whole = compiled(split), compiled(OPS[op])
    truth = functools.partial(OPS[op], implementation="reference")
    ids = rows(n)
    for i in range(0, len(ids), 4):
        for actual, expected in zip(split(ids[i : i + 4], arrays), whole(ids[i : i + 4], arrays), strict=True):
            assert_close(actual, expected, 2 * ROUNDING)
    expected = exactly(truth, **jax.device_get(arrays), segment_ids=ids[-4:])
    assert_close(split(ids[-4:], arrays)[0], dict(enumerate(expected)), BOUNDS["float32"])


@pytest.mark.parametrize(
    "n, batch, heads, groups, D, omitted",
    [
        (2, 2, 2, 2, "h p", ()),
        (4, 1, 2, 1, "h", ("z", "initial_state")),
    ],
)
def test_ssd(n, batch, heads, groups, D, omitted):
    """Together with batch and heads."""
    arrays = without(problem(b=2, l=LENGTH, h=4, g=groups, p=4, n=4, D=D), *omitted)
    function = functools.partial(pk.ssd, dt_softplus=True, dt_limit=(0.02, 0.5), return_final_state="z" not in omitted)
    with pieces(n, batch, heads):
        actual = outputs_and_gradients(function, arrays)
    truth = functools.partial(function, implementation="reference")
    for a, e in zip(actual, outputs_and_gradients(truth, arrays, "float64"), strict=True):
        assert_close(a, e, BOUNDS["float32"])


@pytest.mark.parametrize("n, batch, heads", [(4, 2, 1), (2, 1, 2)])
def test_a_mixer_in_one_call(n, batch, heads):
    """Every argument of `mamba2_sequence`, whose parts are split one by one; segments that cross the boundary."""
    arrays = mamba2_sequence_problem(b=2, l=16, h=4, p=4, n=4, g=2)
    ids = jnp.asarray(np.repeat([[0, 1, -1], [3, 3, 4]], [9, 5, 2], axis=1).astype(np.int32))
    function = functools.partial(pk.mamba2_sequence, groups=2, segment_ids=ids, return_states=True)
    with pieces(n, batch, heads):
        actual = outputs_and_gradients(function, arrays)
    for a, e in zip(actual, outputs_and_gradients(function, arrays), strict=True):
        assert_close(a, e, 2 * ROUNDING)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_strong_decay(dtype):
    """Decays over a piece underflow, and near its end they are differences of large sums."""
    arrays = without(problem(b=1, l=256, h=2, g=1, dtype=dtype), "dt_bias")
    arrays["A"] = np.full_like(arrays["A"], -16)
    arrays["dt"] = np.random.default_rng(1).uniform(0, 10, arrays["dt"].shape).astype(arrays["dt"].dtype)
    arrays["dt"][:, ::3] = 0.001
    with pieces(8):
        actual = jax.jit(lambda arrays: pk.ssd(**arrays, return_final_state=True))(arrays)
    assert [a.dtype for a in actual] == [dtype, jnp.float32]
    expected = exactly(pk.ssd, **arrays, return_final_state=True)
    assert_close(named(actual, "y", "state"), named(expected, "y", "state"), max(2e-3, BOUNDS[dtype]))


def test_low_precision_states_of_the_convolution():
    """The final state keeps the dtype of the first; the halo is as exact as x."""
    arrays = causal_conv1d_suite.problem(b=1, l=16)
    arrays["initial_state"] = arrays["initial_state"].astype(jnp.bfloat16)
    arrays = jax.tree.map(jnp.asarray, arrays)
    function = functools.partial(pk.causal_conv1d, return_final_state=True)
    y, state = function(**arrays)
    with pieces(4):
        split_y, split_state = jax.jit(lambda arrays: function(**arrays))(arrays)
    assert split_state.dtype == jnp.bfloat16
    np.testing.assert_array_equal(split_state, state)
    np.testing.assert_allclose(split_y, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("width", [1, 2])
def test_widths_of_the_convolution(width, implementation):
    arrays = causal_conv1d_suite.problem(b=2, l=8, c=4, w=width)
    function = functools.partial(pk.causal_conv1d, return_final_state=True, implementation=implementation)
    with pieces(8):
        actual = jax.jit(lambda arrays: function(**arrays))(arrays)
    expected = exactly(pk.causal_conv1d, **arrays, return_final_state=True)
    assert_close(named(actual, "y", "state"), named(expected, "y", "state"), BOUNDS["float32"])


def test_a_mixer_moves_states_and_halos_only():
    """Convolution, scan and norm on pieces: what is gathered has the size of states, whatever the length."""
    h, p, n, length = 2, 4, 8, 512
    arrays = {
        "xBC": jax.ShapeDtypeStruct((2, length, h * p + 2 * n), jnp.float32),
        "z": jax.ShapeDtypeStruct((2, length, h * p), jnp.float32),
        "dt": jax.ShapeDtypeStruct((2, length, h), jnp.float32),
    }
    mesh = mesh_of(data=2, sequence=4)
    place = NamedSharding(mesh, PartitionSpec("data", "sequence"))

    def mixer(xBC, z, dt):
        xBC = pk.causal_conv1d(xBC, jnp.ones((h * p + 2 * n, 4)), activation="silu")
        x, B, C = jnp.split(xBC, [h * p, h * p + n], axis=-1)
        B, C = B[:, :, None], C[:, :, None]
        y = pk.ssd(x.reshape(2, length, h, p), dt, -jnp.ones(h), B, C, dt_softplus=True)
        return pk.gated_rms_norm(y.reshape(z.shape), z, jnp.ones(h * p), eps=1e-5)

    def loss(arrays):
        with pk.use_mesh(mesh, batch="data", sequence="sequence"):
            return jnp.sum(mixer(**arrays) ** 2)

    gradient = jax.jit(jax.grad(loss), in_shardings=(place,), out_shardings=place)
    text = gradient.lower(arrays).compile().as_text()
    assert {"all-gather", "collective-permute"} <= collectives(text)
    moved = re.findall(r"= \(?\w+\[([\d,]*)\]\S* (?:all-gather|all-to-all|collective-permute|reduce-scatter)\(", text)
    sizes = [np.prod([int(size) for size in shape.split(",") if size]) for shape in moved]
    assert max(sizes) == 4 * 1 * h * p * n  # the states of all pieces

    values = {name: jnp.asarray(np.random.default_rng(0).normal(size=a.shape), a.dtype) for name, a in arrays.items()}
    expected = jax.jit(jax.grad(lambda arrays: jnp.sum(mixer(**arrays) ** 2)))(values)
    assert_close(jax.device_get(gradient(values)), jax.device_get(expected), 10 * ROUNDING)


# What is refused.


def test_lengths_that_do_not_divide():
    arrays = {name: jnp.asarray(a) for name, a in problem(l=37).items()}
    message = r"got 37 tokens, expected a multiple of 4, the size of sequence=\('outer', 'inner'\)"
    with pieces(4), pytest.raises(ValueError, match=message):
        pk.ssd(**arrays)


def test_pieces_shorter_than_the_window():
    arrays = {name: jnp.asarray(a) for name, a in causal_conv1d_suite.problem(l=16).items()}
    message = "got pieces of 2 tokens, expected at least the 3 that a convolution of width 4 looks back"
    with pieces(8), pytest.raises(ValueError, match=message):
        pk.causal_conv1d(**arrays)
