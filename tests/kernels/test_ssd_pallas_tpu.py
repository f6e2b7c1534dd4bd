"""The Pallas TPU backend of `ssd`, run by Pallas' interpreter: slow, so a cover of the suite; all of it with `-m tpu`.

The interpreter simulates a TPU's memories, with NaN in what was never written, and reports races between its copies,
steps and cores. Which layouts the compiler accepts it does not know: that the kernels lower is tested apart.
"""

import functools
import re
import types

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.lax import Precision

import pallas_kernels as pk
from pallas_kernels.specs import SSD_SPECS, SSDSpec
from pallas_kernels.ssd.pallas_tpu.layout import VMEM, make_layout, vmem_bytes
from tests.conftest import optimizations_disabled
from tests.kernels.compare import BOUNDS, assert_close, jitted, named, on_device, outputs_and_gradients
from tests.kernels.ssd_suite import KernelSSDSuite, problem, without
from tests.kernels.test_ssd import equations


@pytest.fixture
def quickly_compiled():
    """The interpreter's programs take longer to optimize than to run."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", optimizations_disabled())


@pytest.fixture
def interpreted(capsys, quickly_compiled):
    """Kernels run in the interpreter, without a race."""
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
        yield
    assert "RACE DETECTED" not in capsys.readouterr().out


def ssd(**options):
    return jitted(pk.ssd, implementation="pallas_tpu", **options)


@pytest.mark.tpu
class TestPallasTPU(KernelSSDSuite):
    """float16 problems are handed to the kernel in bfloat16. Interpreted where there is no TPU, which takes long."""

    implementation = "pallas_tpu"
    bounds = BOUNDS | {"float16": BOUNDS["bfloat16"]}
    dtypes = ("float32", "bfloat16")

    @pytest.fixture(autouse=True)
    def where(self, request):
        if jax.default_backend() != "tpu":
            request.getfixturevalue("interpreted")

    def ssd(self, **options):
        dtype = options["x"].dtype
        if dtype == jnp.float16:
            options |= {name: jnp.asarray(options[name], jnp.bfloat16) for name in ("x", "B", "C")}
        outputs = super().ssd(**options)
        y, *state = outputs if isinstance(outputs, tuple) else (outputs,)
        return (y.astype(dtype), *state) if state else y.astype(dtype)

    def step(self, **options):
        return jitted(pk.ssd_step, implementation="xla", **options)


# What the interpreter is trusted with.


def test_the_interpreter_finds_races(capsys):
    """Two cores that add to the same block, which the grid wrongly calls independent."""

    def body(x_ref, sum_ref):
        sum_ref[...] += x_ref[...]

    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)):
        add = pl.pallas_call(
            body,
            out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32),
            grid=(4,),
            in_specs=[pl.BlockSpec((None, 8, 128), lambda i: (i, 0, 0))],
            out_specs=pl.BlockSpec((8, 128), lambda i: (0, 0)),
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        )
        jax.block_until_ready(jax.jit(add)(jnp.ones((4, 8, 128))))
    assert "RACE DETECTED" in capsys.readouterr().out


# Outputs, final state and all gradients against the recurrence in float64, some against the errors of XLA too.


def packed(*rows):
    """segment_ids from a list of (id, tokens) for each row."""
    return np.stack([np.repeat(*np.array(row, np.int32).T) for row in rows])


def strong_decay():
    """exp(sum of dt A) underflows within a few tokens; a decay split into exp(s_i) exp(-s_j) would overflow."""
    arrays = without(problem(b=1, l=50, h=2, g=1), "dt_bias", "z")
    arrays["A"][:] = -16
    arrays["dt"] = np.random.default_rng(1).uniform(0, 10, arrays["dt"].shape).astype(np.float32)
    arrays["dt"][:, ::3] = 0.001
    return arrays


SEGMENTS = packed(
    [(-1, 3), (5, 10), (2, 6), (-3, 6), (5, 15), (-1, 11)],  # padding in front, between, behind; an id comes back
    [(0, 16), (1, 1), (2, 1), (0, 15), (7, 2), (8, 16)],  # starts on the edge of a chunk, sequences of one token
)
CASES = {
    "17 tokens, groups": (problem(b=1, l=17, h=4, g=4, D="h p"), {"chunk_size": 16}),
    "65 tokens": (problem(b=1, l=65, h=2, g=1, p=64, n=16), {"chunk_size": 32}),
    "119 tokens, two blocks": (without(problem(b=1, l=119, h=4, g=1, p=130), "z"), {"chunk_size": 64}),
    "no options": (without(problem(b=1, l=20, h=2), "D", "z", "dt_bias", "initial_state"), {}),
    "bfloat16": (problem(b=1, l=80, dtype="bfloat16"), {"chunk_size": 32}),
    "segments": (problem(l=51), {"chunk_size": 16, "segment_ids": SEGMENTS}),
    "strong decay": (strong_decay(), {"chunk_size": 16, "dt_softplus": False}),
}
# On top of 1.5 times the error of XLA, as a part of the largest number: a few of the dtype's spacings at 1, or a quarter.
ALLOWANCE = {"float32": 3e-7, "bfloat16": 2e-3}


@pytest.mark.parametrize("name", CASES)
def test_against_float64(interpreted, name):
    arrays, options = CASES[name]
    options = on_device({"dt_softplus": True, "return_final_state": True} | options)
    dtype = str(arrays["x"].dtype)

    def run(implementation, precise=None):
        function = functools.partial(jitted, pk.ssd, implementation=implementation, **options)
        return outputs_and_gradients(function, arrays, precise)

    actual, expected = run("pallas_tpu"), run("reference", "float64")
    for ours, truth in zip(actual, expected, strict=True):
        # Sums of dt A reach hundreds under strong decay, where neighbouring float32 numbers lie 3e-5 apart.
        assert_close(ours, truth, 2e-3 if name == "strong decay" else BOUNDS[dtype])
    if name not in ("65 tokens", "bfloat16", "strong decay"):
        return
    for ours, xla, truth in zip(actual, run("xla"), expected, strict=True):
        for array in truth:
            largest = np.abs(truth[array]).max()
            error, allowed = (np.abs(a[array] - truth[array]).max() / largest for a in (ours, xla))
            assert error <= 1.5 * allowed + ALLOWANCE[dtype], array


def test_one_token_on_the_edges_of_dt_limit(interpreted):
    """Outside the limits the gradient is exactly zero; on them it is that of the step size itself."""
    arrays = without(problem(b=5, l=1, h=3, g=1, p=5, n=3), "dt_bias", "z", "D")
    arrays["dt"][:] = np.array([0.12, 0.125, 0.3, 0.5, 0.51], np.float32)[:, None, None]
    function = functools.partial(pk.ssd, dt_limit=(0.125, 0.5))
    actual, expected = (
        outputs_and_gradients(functools.partial(function, implementation=name), arrays, dtype)
        for name, dtype in (("pallas_tpu", None), ("reference", "float64"))
    )
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, BOUNDS["float32"])
    gradient = actual[1]["gradient of dt"]
    assert (gradient[[0, 4]] == 0).all() and (gradient[1:4] != 0).all()


def test_pieces_equal_the_whole(interpreted):
    arrays = without(problem(b=1, l=50, h=2, g=1), "z")
    options = {"dt_softplus": True, "return_final_state": True, "chunk_size": 16}
    whole = ssd(**arrays, **options)
    state, pieces = arrays["initial_state"], []
    for tokens in (slice(0, 17), slice(17, 50)):
        piece = {name: a[:, tokens] if name in ("x", "dt", "B", "C") else a for name, a in arrays.items()}
        y, state = ssd(**piece | {"initial_state": state}, **options)
        pieces.append(y)
    actual = named((np.concatenate(pieces, axis=1), state), "y", "state")
    assert_close(actual, named(whole, "y", "state"), BOUNDS["float32"])


def test_padding_keeps_its_hands_off(interpreted):
    """What stands in padding changes neither results nor gradients; a row of nothing else returns its state."""
    arrays = without(problem(b=2, l=20, h=2, g=1), "z")
    ids = packed([(-1, 5), (4, 6), (-1, 9)], [(-1, 20)])
    changed = {name: a.copy() for name, a in arrays.items()}
    for name in ("x", "dt", "B", "C"):
        changed[name][ids < 0] = 1e4
    options = {"segment_ids": jnp.asarray(ids), "dt_softplus": True, "return_final_state": True}
    scan = jax.jit(functools.partial(pk.ssd, **options, implementation="pallas_tpu"))
    run = functools.partial(jax.vjp, lambda arrays: scan(**arrays))
    (y, state), pull_back = run(changed)
    (expected_y, _), expected_pull_back = run(arrays)
    np.testing.assert_array_equal(y, expected_y)
    assert (np.asarray(y)[ids < 0] == 0).all() and (np.asarray(y)[ids >= 0] != 0).all()
    np.testing.assert_array_equal(state[1], arrays["initial_state"][1])
    gradients, expected = (pull((jnp.ones_like(y), state))[0] for pull in (pull_back, expected_pull_back))
    for name in gradients:
        np.testing.assert_array_equal(gradients[name], expected[name], err_msg=name)


def test_order_and_cores_change_no_bit(capsys, quickly_compiled):
    """Independent steps run in random order on one core and on two, which never touch the same block."""
    arrays = without(problem(l=5, h=1, g=1, dtype="bfloat16"), "z", "D", "initial_state")

    def run(**interpretation):
        with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True, **interpretation)):
            return outputs_and_gradients(ssd, arrays)

    first, second = run(random_seed=0), run(random_seed=1, num_cores_or_threads=2)
    assert "RACE DETECTED" not in capsys.readouterr().out
    for a, b in zip(first, second, strict=True):
        for name in a:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.mark.parametrize(
    "dtype, precision, expected",
    [
        ("float32", None, Precision.HIGHEST),
        ("float32", "high", Precision.HIGHEST),
        ("float32", Precision.DEFAULT, Precision.DEFAULT),
        ("bfloat16", None, Precision.DEFAULT),
        ("bfloat16", "highest", Precision.DEFAULT),  # products of bfloat16 are exact
    ],
)
def test_precision_of_products(dtype, precision, expected):
    """Of those of x, B and C; the few sums that are written as products with ones are always exact."""

    def loss(arrays):
        y = pk.ssd(**arrays, precision=precision, implementation="pallas_tpu")
        return jnp.sum(y.astype(jnp.float32))

    jaxpr = jax.make_jaxpr(jax.grad(loss))(SSDSpec(b=1, l=256, h=2, dtype=dtype).shapes()).jaxpr
    products = [e.params for e in equations(jaxpr) if e.primitive.name == "dot_general"]
    assert all(p["preferred_element_type"] == jnp.float32 for p in products)
    found = [p["precision"][0] for p in products]
    assert len(found) > 20 and set(found) == {expected, Precision.HIGHEST}
    assert found.count(Precision.HIGHEST) < 8 or expected == Precision.HIGHEST


def test_keeps_only_its_arguments_for_the_gradient():
    arrays = SSD_SPECS["train"].shapes()
    kept = jax.eval_shape(lambda a: jax.vjp(lambda a: pk.ssd(**a, implementation="pallas_tpu"), a)[1], arrays)
    of_arrays = lambda tree: sorted((a.shape, str(a.dtype)) for a in jax.tree.leaves(tree))  # noqa: E731
    assert of_arrays(kept) == of_arrays(arrays)


# Who is refused, and why.


def abstract(dtype="bfloat16", **sizes):
    return SSDSpec(**{"b": 2, "l": 100, "h": 4, "dtype": dtype} | sizes).shapes()


@pytest.mark.parametrize(
    "arrays, options, reason",
    [
        (abstract("float16"), {}, "x is float16; the kernel multiplies float32 or bfloat16"),
        (abstract() | {"C": abstract("float32")["C"]}, {}, "x, B and C are bfloat16, bfloat16 and float32"),
        (abstract(), {"precision": jax.lax.DotAlgorithmPreset.BF16_BF16_F32}, "precision is BF16_BF16_F32"),
        (abstract(h=512, n=256), {}, "a group of 512 heads, 64 wide, with states of 256 does not fit into VMEM"),
    ],
)
def test_refuses(arrays, options, reason):
    with pytest.raises(ExceptionGroup) as error:
        jax.eval_shape(lambda arrays: pk.ssd(**arrays, **options, implementation="pallas_tpu"), arrays)
    assert str(error.value.exceptions[0]).startswith(f"pallas_tpu: {reason}")


def test_never_chosen_by_itself(monkeypatch):
    explanation = pk.explain("ssd", **abstract())
    assert explanation.reasons["pallas_tpu"] == "needs a TPU, the default device is a cpu"
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(platform="tpu")])
    explanation = pk.explain("ssd", **abstract())
    assert explanation.chosen == "xla"
    reason = "it would run, but nobody has measured it to beat xla on a tpu; name it to use it"
    assert explanation.reasons["pallas_tpu"] == reason
    assert "x is float16" in pk.explain("ssd", **abstract("float16")).reasons["pallas_tpu"]


# The layout, and lowering on a machine without a TPU.


@pytest.mark.parametrize("chunk_size", [None, 1, 40, 1000])
@pytest.mark.parametrize("p, n, h, g", [(64, 128, 80, 1), (64, 128, 7, 7), (5, 3, 12, 2), (300, 256, 6, 3)])
def test_layout(p, n, h, g, chunk_size):
    arrays = SSDSpec(b=1, l=729, p=p, n=n, h=h, g=g).shapes()
    layout = make_layout(arrays["x"], arrays["B"], chunk_size)
    assert layout.tile % 128 == 0 and layout.block % layout.tile == 0 and layout.head_lanes >= p
    assert h // g % layout.block_heads == 0 and layout.chunk % 16 == 0 and layout.chunk <= 256
    assert (layout.chunks - 1) * layout.chunk < 729 <= layout.chunks * layout.chunk
    assert vmem_bytes(layout, 2) <= VMEM
    assert (p, n) != (64, 128) or layout.lanes_of_state == n  # nothing is filled where it fits
    assert (p, h) != (64, 80) or (layout.head_lanes, layout.block_heads) == (p, 4 if chunk_size == 1000 else 8)


SHAPES = SSD_SPECS | {
    "float32": SSDSpec(b=1, l=729, dtype="float32"),
    "one token": SSDSpec(b=1, l=1, h=3, n=64),
    "small": SSDSpec(b=2, l=37, h=4, p=8, n=16, g=2, dtype="float32"),
    "wide": SSDSpec(b=1, l=300, h=4, p=192, n=256, g=2),
}


def scan(arrays, options):
    everything = "initial_state" in arrays
    return pk.ssd(**arrays, **options, return_final_state=everything, implementation="pallas_tpu")


def gradient(arrays, options):
    """Of everything that comes out, with respect to the floating-point arguments."""

    def loss(arrays):
        return sum(jnp.sum(a.astype(jnp.float32)) for a in jax.tree.leaves(scan(arrays, options)))

    return jax.value_and_grad(loss)(arrays)


def arguments(spec: SSDSpec, everything: bool):
    if not everything:
        return spec.shapes(), {}
    more = {
        "D": jax.ShapeDtypeStruct((spec.h, spec.p), jnp.float32),
        "z": spec.shapes()["x"],
        "initial_state": jax.ShapeDtypeStruct((spec.b, spec.h, spec.p, spec.n), jnp.float32),
    }
    return spec.shapes() | more, {"segment_ids": jax.ShapeDtypeStruct((spec.b, spec.l), jnp.int32)}


@pytest.mark.parametrize("everything", [False, True], ids=["plain", "everything"])
@pytest.mark.parametrize("name", SHAPES)
def test_lowers_for_tpu(name, everything):
    def kernels(function):
        exported = jax.export.export(jax.jit(function), platforms=["tpu"])(*arguments(SHAPES[name], everything))
        text = exported.mlir_module()
        found = re.findall('kernel_name = "([a-z_]+)"', text)
        assert text.count("@tpu_custom_call") == len(found)
        return found

    assert kernels(scan) == ["ssd_forward"]
    assert kernels(gradient) == ["ssd_forward", "ssd_states", "ssd_backward"]


@pytest.mark.tpu
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_compiles_for_tpu(topology, name, monkeypatch):
    """All that lowering leaves open: vector layouts and the size of VMEM. Needs libtpu, but no TPU."""
    pytest.importorskip("libtpu")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    there = jax.sharding.SingleDeviceSharding(device)
    compiled = jax.jit(gradient, in_shardings=there, out_shardings=there)
    compiled.lower(*arguments(SHAPES[name], everything=True)).compile()
