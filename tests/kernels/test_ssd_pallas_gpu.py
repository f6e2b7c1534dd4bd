"""The Mosaic GPU backend of `ssd`: for real with `-m gpu`; on a CPU all but the kernel, and that the kernel lowers.

Pallas' interpreter for Mosaic GPU is private and knows neither loads with a layout nor accumulators that start from a
value, so on a CPU `walk_emulation` stands in for the kernel.
"""

import dataclasses
import types

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from pallas_kernels.specs import SSD_SPECS, SSDSpec
from pallas_kernels.ssd import pallas_gpu
from pallas_kernels.ssd.pallas_gpu import backward, exponents, forward
from tests.kernels import gradient_emulation, walk_emulation
from tests.kernels.compare import BOUNDS, assert_close, exactly, named, outputs_and_gradients
from tests.kernels.ssd_suite import KernelSSDSuite, problem, without

OPERANDS = ("x", "B", "C", "z")


@pytest.mark.gpu
class TestPallasGPU(KernelSSDSuite):
    """The kernel multiplies 16-bit operands: float32 problems are handed to it in bfloat16."""

    implementation = "pallas_gpu"
    bounds = BOUNDS | {"float32": BOUNDS["bfloat16"]}
    dtypes = ("bfloat16", "float16")

    def ssd(self, **options):
        dtype = options["x"].dtype
        if dtype == jnp.float32:
            options |= {name: jnp.asarray(options[name], jnp.bfloat16) for name in OPERANDS if name in options}
        outputs = super().ssd(**options)
        y, *state = outputs if isinstance(outputs, tuple) else (outputs,)
        return (y.astype(dtype), *state) if state else y.astype(dtype)

    def test_long_sequence_in_parts(self):
        assert forward.make_plan(1, 4100, 4, 1, 64).parts > 1
        ids = np.random.default_rng(0).integers(-1, 2, (1, 41)).repeat(100, axis=1).astype(np.int32)
        arrays = problem(b=1, l=4100, h=4, g=1, p=64, n=64)
        self.check(arrays)
        self.check(arrays, segment_ids=ids)

    def test_more_than_2_to_the_31_elements(self):
        self.check_more_than_2_to_the_31_elements()

    def test_runs_the_kernel(self):
        shapes = SSD_SPECS["image"].shapes()
        lowered = jax.jit(lambda arrays: pk.ssd(**arrays)).lower(shapes).as_text()
        assert "ssd_walk" in lowered  # chosen without being named


# All but the kernel.


@pytest.fixture(params=[1, 3], ids=["whole", "in parts"])
def emulated(request, monkeypatch):
    """`ssd` with the kernel replaced by its emulation in float32, the sequence whole or in parts."""
    make_plan = forward.make_plan

    def plan(*args):
        whole = dataclasses.replace(make_plan(*args), parts=1)
        parts = min(request.param, whole.chunks)
        return dataclasses.replace(whole, parts=parts, chunks=-(-whole.chunks // parts) * parts)

    monkeypatch.setattr(exponents, "cumulated", walk_emulation.cumulated)
    monkeypatch.setattr(forward, "walk", walk_emulation.walk)
    monkeypatch.setattr(forward, "states_of_parts", walk_emulation.states_of_parts)
    monkeypatch.setattr(forward, "make_plan", plan)
    monkeypatch.setattr(backward, "boundary_states", gradient_emulation.boundary_states)
    monkeypatch.setattr(backward, "chunk_gradients", gradient_emulation.chunk_gradients)
    monkeypatch.setattr(backward, "log_decay_gradients", gradient_emulation.log_decay_gradients)
    monkeypatch.setattr(pallas_gpu, "why_not_ssd", lambda *args, **kwargs: None)

    def check(arrays, bound=BOUNDS["float32"], **options):
        options = {"dt_softplus": True, "return_final_state": True} | options
        actual = jax.jit(lambda arrays: pk.ssd(**arrays, **options, implementation="pallas_gpu"))(arrays)
        assert_close(named(actual, "y", "state"), named(exactly(pk.ssd, **arrays, **options), "y", "state"), bound)

    return check


@pytest.mark.parametrize("length", [1, 63, 65, 200, 729])
def test_lengths(emulated, length):
    emulated(problem(l=length))


@pytest.mark.parametrize("head_dim, state_size, groups", [(5, 3, 2), (64, 128, 1), (128, 64, 4), (192, 256, 2)])
def test_widths(emulated, head_dim, state_size, groups):
    emulated(problem(b=1, l=150, h=4, g=groups, p=head_dim, n=state_size, D="h p"))


@pytest.mark.parametrize("omitted", [("D",), ("z",), ("dt_bias",), ("D", "z", "initial_state")])
def test_without_optional_arguments(emulated, omitted):
    emulated(without(problem(l=150), *omitted))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bits(emulated, dtype):
    emulated(problem(l=150, dtype=dtype), BOUNDS[dtype])


def test_strong_decay(emulated):
    arrays = problem(l=300)
    arrays["A"][:] = -16
    arrays["dt"] *= 10
    arrays["dt"][:, ::3] = -7
    emulated(arrays, 2e-3)


@pytest.mark.parametrize("run", [1, 20, 64, 150])
def test_segments(emulated, run):
    """Sequences and padding of all positions relative to chunks and parts."""
    ids = np.random.default_rng(run).integers(-1, 3, (2, -(-500 // run))).repeat(run, axis=1)[:, :500]
    emulated(problem(l=500) | {"segment_ids": ids.astype(np.int32)})


def test_padding_only(emulated):
    emulated(problem(l=150) | {"segment_ids": np.full((2, 150), -1, np.int32)})


def test_dt_limit(emulated):
    emulated(problem(l=100), dt_limit=(0.05, 0.2))


def test_gradient(emulated):
    """Of every array, packed sequences and all: integers take part in the rule and have no gradient."""
    ids = jnp.asarray(np.repeat([[0, -1, 1], [3, 3, 2]], 50, axis=1).astype(np.int32))
    options = {"dt_softplus": True, "return_final_state": True, "segment_ids": ids}
    arrays = problem(l=150)
    actual, expected = (
        outputs_and_gradients(lambda i=i, **a: pk.ssd(**a, **options, implementation=i), arrays, dtype)
        for i, dtype in (("pallas_gpu", None), ("reference", "float64"))
    )
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, BOUNDS["float32"])


# Who is refused, and why.


def abstract(dtype="bfloat16", **sizes):
    return SSDSpec(**{"b": 2, "l": 100, "h": 4, "dtype": dtype} | sizes).shapes()


@pytest.mark.parametrize(
    "arrays, options, reason",
    [
        (abstract("float32"), {}, "x is float32; the kernel multiplies bfloat16 or float16"),
        (abstract() | {"C": abstract("float16")["C"]}, {}, "x, B and C are bfloat16, bfloat16 and float16"),
        (abstract(p=96), {}, "heads are 96 wide; the kernel takes up to 64, or a multiple of 64"),
        (abstract(n=512), {}, "the state size is 512; the kernel keeps at most 256 in registers"),
        (abstract(), {"dt_limit": (-1.0, 1.0)}, "dt_limit starts at -1.0; the kernel takes logarithms"),
    ],
)
def test_refuses(arrays, options, reason):
    with pytest.raises(ExceptionGroup) as error:
        jax.eval_shape(lambda arrays: pk.ssd(**arrays, **options, implementation="pallas_gpu"), arrays)
    assert str(error.value.exceptions[0]).startswith(f"pallas_gpu: {reason}")
    assert pk.explain("ssd", **arrays, **options, implementation=("pallas_gpu", "xla")).chosen == "xla"


def test_not_chosen_without_its_device():
    explanation = pk.explain("ssd", **abstract())
    assert explanation.chosen == "xla"
    reason = "needs a CUDA device of compute capability 9.x, the default device is a cpu"
    assert explanation.reasons["pallas_gpu"] == reason


@pytest.mark.parametrize(
    "platform, capability, reason",
    [
        ("gpu", "9.0", None),
        ("gpu", "8.0", "needs a CUDA device of compute capability 9.x, Some GPU has 8.0"),
        ("gpu", "10.0", "needs a CUDA device of compute capability 9.x, Some GPU has 10.0"),
        ("tpu", None, "needs a CUDA device of compute capability 9.x, the default device is a tpu"),
    ],
)
def test_which_devices(monkeypatch, platform, capability, reason):
    device = types.SimpleNamespace(platform=platform, compute_capability=capability, device_kind="Some GPU")
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert pallas_gpu.why_not_here() == reason
    if reason is None:
        monkeypatch.setattr(jax, "devices", lambda: [device, device])
        assert "several devices" in pallas_gpu.why_not_here()


# The plan, and lowering on a machine without a GPU.


@pytest.mark.parametrize(
    "batch, length, slices, groups, n", [(1, 131072, 80, 1, 128), (4, 4096, 80, 8, 64), (1, 1, 3, 1, 256)]
)
def test_plan_covers_the_sequence(batch, length, slices, groups, n):
    plan = forward.make_plan(batch, length, slices, groups, n)
    assert plan.chunks == plan.parts * plan.chunks_per_part
    assert plan.chunks - plan.chunks_per_part < -(-length // 64) <= plan.chunks  # no part is all behind the end
    assert slices // groups % plan.heads == 0


def test_plan_splits_where_heads_are_few():
    assert forward.make_plan(8, 2048, 80, 1, 128).parts == 1
    assert forward.make_plan(1, 8192, 80, 1, 128).parts > 1


def export(function, arrays) -> str:
    unstable = [jax.export.DisabledSafetyCheck.custom_call(name) for name in ("mosaic_gpu", "mosaic_gpu_v2")]
    exported = jax.export.export(jax.jit(function), platforms=["cuda"], disabled_checks=unstable)(arrays)
    return exported.mlir_module()


SHAPES = {
    "train": SSD_SPECS["train"],
    "long": SSD_SPECS["long"],
    "ragged": SSDSpec(b=1, l=729, h=2, g=2),
    "one token": SSDSpec(b=1, l=1, h=3, n=64),
    "small": SSDSpec(b=2, l=37, h=4, p=8, n=16, g=2, dtype="float16"),
    "wide heads": SSDSpec(b=1, l=300, h=2, p=128),
    "wide state": SSDSpec(b=1, l=300, h=2, n=256),
}


def arguments(spec, everything: bool) -> dict:
    arrays = spec.shapes()
    if everything:
        arrays |= {
            "D": jax.ShapeDtypeStruct((spec.h, spec.p), jnp.float32),
            "z": arrays["x"],
            "initial_state": jax.ShapeDtypeStruct((spec.b, spec.h, spec.p, spec.n), jnp.float32),
            "segment_ids": jax.ShapeDtypeStruct((spec.b, spec.l), jnp.int32),
        }
    return arrays


@pytest.mark.parametrize("everything", [False, True], ids=["plain", "everything"])
@pytest.mark.parametrize("name", SHAPES)
def test_lowers_for_cuda(name, everything):
    scan = lambda arrays: pk.ssd(**arrays, return_final_state=everything, implementation="pallas_gpu")  # noqa: E731
    text = export(scan, arguments(SHAPES[name], everything))
    assert "ssd_exponents" in text and "ssd_walk" in text
    assert ("ssd_states" in text) == (name in ("long", "ragged"))  # few heads, so in parts


@pytest.mark.parametrize("everything", [False, True], ids=["plain", "everything"])
@pytest.mark.parametrize("name", ["train", "small", "wide heads"])
def test_gradient_lowers_for_cuda(name, everything):
    def loss(arrays):
        return jnp.sum(pk.ssd(**arrays, implementation="pallas_gpu").astype(jnp.float32))

    arrays = arguments(SHAPES[name], everything)
    integers = {key: arrays.pop(key) for key in ("segment_ids",) if key in arrays}
    grad = lambda arguments: jax.value_and_grad(lambda arrays: loss(arrays | arguments[1]))(arguments[0])  # noqa: E731
    text = export(grad, (arrays, integers))
    for kernel in ("ssd_walk", "ssd_boundaries", "ssd_gradients", "ssd_log_decays"):
        assert kernel in text
