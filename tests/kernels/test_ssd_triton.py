"""The Triton backend of `ssd`: for real with `-m gpu`; on a CPU all but the kernels.

On a CPU `triton_emulation` stands in for the kernels. Where Triton is installed, TRITON_INTERPRET=1 runs the kernels
themselves in its interpreter.
"""

import functools
import importlib
import importlib.util
import os
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from pallas_kernels.specs import SSD_SPECS, SSDSpec
from pallas_kernels.ssd.triton import backward, forward, launch, plan
from tests.kernels import triton_emulation
from tests.kernels.compare import BOUNDS, assert_as_exact, assert_close, outputs_and_gradients
from tests.kernels.ssd_suite import KernelSSDSuite, problem, without

backend = importlib.import_module("pallas_kernels.ssd.triton")


def packed(*runs):
    """Ids and padding, the runs of each row of one length after the other, as `segment_ids`."""
    return jnp.asarray(np.repeat(np.array([ids for ids, _ in runs]), runs[0][1], axis=1).astype(np.int32))


@pytest.mark.gpu
class TestTriton(KernelSSDSuite):
    implementation = "triton"

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    @pytest.mark.parametrize("head_dim, state_size", [(64, 128), (32, 256), (80, 48)])
    def test_as_exact_as_xla_when_packed(self, dtype, head_dim, state_size):
        arrays = problem(l=300, p=head_dim, n=state_size, D="h p", dtype=dtype)
        ids = packed(([0, 0, 1, -1, 2, 2], 50), ([-1, 5, 5, 5, 5, 0], 50))
        options = {"dt_softplus": True, "return_final_state": True, "segment_ids": ids}
        ours, theirs, exact = (
            {
                name: a
                for part in outputs_and_gradients(functools.partial(pk.ssd, implementation=i, **options), arrays, to)
                for name, a in part.items()
            }
            for i, to in (("triton", None), ("xla", None), ("reference", "float64"))
        )
        assert_as_exact(ours, theirs, exact, dtype)

    def test_precision(self):
        """TF32 where it is asked for: 11 bits of each operand."""
        arrays = problem(p=64, n=64, l=100)
        exact, full, less = (
            pk.ssd(**{n: jnp.asarray(a) for n, a in arrays.items()}, dt_softplus=True, implementation=i, precision=p)
            for i, p in (("xla", "highest"), ("triton", "highest"), ("triton", "default"))
        )
        size = np.abs(exact).max()
        assert np.abs(full - exact).max() < 5e-6 * size
        assert 5e-5 * size < np.abs(less - exact).max() < 5e-3 * size

    def test_more_than_2_to_the_31_elements(self):
        self.check_more_than_2_to_the_31_elements()

    def test_rows_of_vmap(self):
        arrays = {name: jnp.asarray(a) for name, a in problem(b=3, l=40).items()}
        rows = {name: a[:, None] if a.ndim > 2 else a for name, a in arrays.items()}
        axes = {name: 0 if a.ndim > 2 else None for name, a in arrays.items()}
        y = jax.vmap(lambda arrays: pk.ssd(**arrays, implementation="triton"), (axes,))(rows)
        np.testing.assert_array_equal(y[:, 0], pk.ssd(**arrays, implementation="triton"))

    def test_runs_the_kernels(self):
        shapes = SSDSpec(b=2, l=300, h=4, dtype="float32").shapes()
        scan = jax.jit(lambda arrays: pk.ssd(**arrays, implementation="triton"))
        lowered = scan.lower(shapes).as_text(debug_info=True)
        assert lowered.count("@triton_kernel_call") == 2 and "ssd_states" in lowered and "ssd_outputs" in lowered


# All but the kernels.


@pytest.fixture
def check(monkeypatch):
    """Outputs and gradients of `ssd` against the recurrence in float64, the kernels replaced by their emulation."""
    for module in (forward, backward):
        monkeypatch.setattr(module, "launch", triton_emulation.launch)
    monkeypatch.setattr(backend, "why_not_importable", lambda: None)
    return check_against_recurrence


def check_against_recurrence(arrays, dtype="float32", **options):
    options = {"dt_softplus": True, "return_final_state": True} | options
    actual, expected = (
        outputs_and_gradients(functools.partial(pk.ssd, implementation=i, **options), arrays, to)
        for i, to in (("triton", None), ("reference", "float64"))
    )
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, BOUNDS[dtype])


@pytest.mark.parametrize("length", [1, 32, 33, 150])
def test_lengths(check, length):
    check(problem(l=length))


@pytest.mark.parametrize("head_dim, state_size, groups", [(5, 3, 2), (128, 20, 4), (80, 64, 1)])
def test_widths(check, head_dim, state_size, groups):
    check(problem(b=1, l=70, h=4, g=groups, p=head_dim, n=state_size, D="h p"))


@pytest.mark.parametrize("omitted", [("D",), ("z",), ("dt_bias", "initial_state"), ("D", "z")])
def test_without_optional_arguments(check, omitted):
    check(without(problem(l=70), *omitted), return_final_state="z" in omitted)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bits(check, dtype):
    check(problem(l=150, dtype=dtype), dtype)


@pytest.mark.parametrize("run", [1, 20, 64])
def test_segments(check, run):
    """Sequences and padding at all positions relative to the chunks."""
    ids = np.random.default_rng(run).integers(-1, 3, (2, -(-150 // run))).repeat(run, axis=1)[:, :150]
    check(problem(l=150), segment_ids=jnp.asarray(ids.astype(np.int32)))


def test_dt_limit(check):
    check(problem(l=50), dt_limit=(0.05, 0.2))


# The kernels in Triton's interpreter.


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="runs with TRITON_INTERPRET=1 in the environment")
@pytest.mark.skipif(
    np.lib.NumpyVersion(np.__version__) >= "2.4.0", reason="Triton's interpreter needs NumPy before 2.4"
)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")  # what NumPy 2.4 made an error
@pytest.mark.parametrize("segments", [False, True], ids=["one sequence", "packed"])
def test_interpreted(monkeypatch, dtype, segments):
    from tests.kernels import triton_interpreter

    monkeypatch.setitem(sys.modules, "jax_triton", triton_interpreter)
    monkeypatch.setattr(plan, "FLOAT32", plan.Products("ieee", "ieee"))  # the interpreter knows no bf16x6
    options = {"segment_ids": packed(([-1, 4, 4, 7, -1, 4, 0], 10), ([0, 0, 0, 0, 1, 1, -1], 10))} if segments else {}
    check_against_recurrence(problem(l=70, p=20, n=40, D="h p", dtype=dtype), dtype, **options)


# Who is refused, and why.


def abstract(dtype="bfloat16", **sizes):
    return SSDSpec(**{"b": 2, "l": 100, "h": 4, "dtype": dtype} | sizes).shapes()


@pytest.mark.parametrize(
    "arrays, options, reason",
    [
        (abstract() | {"x": abstract("float64")["x"]}, {}, "x is float64; the kernel multiplies float32, bfloat16 or"),
        (abstract() | {"C": abstract("float16")["C"]}, {}, "x, B and C are bfloat16, bfloat16 and float16"),
        (abstract(p=160), {}, "heads are 160 wide; the kernel takes up to 128"),
        (abstract(n=512), {}, "the state size is 512; the kernel takes up to 256"),
        (abstract("float32", p=128, n=256), {}, "float32 heads 128 wide with states of 256 do not fit"),
        (
            abstract(),
            {"precision": ("highest", "default")},
            "precision is ('highest', 'default'); the kernel takes one",
        ),
        (abstract(), {"precision": "TF32_TF32_F32"}, "precision is TF32_TF32_F32; the kernel takes one"),
        (abstract(), {}, "needs jax-triton 0.3, which cannot be imported: "),
    ],
)
def test_refuses(monkeypatch, arrays, options, reason):
    monkeypatch.setitem(sys.modules, "jax_triton", None)
    with jax.enable_x64(True), pytest.raises(ExceptionGroup) as error:
        jax.eval_shape(lambda arrays: pk.ssd(**arrays, **options, implementation="triton"), arrays)
    assert str(error.value.exceptions[0]).startswith(f"triton: {reason}")
    assert pk.explain("ssd", **arrays, **options, implementation=("triton", "xla")).chosen == "xla"


def test_newer_jax_triton_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax_triton", types.SimpleNamespace(__version__="0.4.0"))
    expected = "needs jax-triton 0.3, found 0.4.0; install ml-mamba-jax[triton] beside a JAX for CUDA"
    assert launch.why_not_importable() == expected


def test_not_chosen_without_its_device():
    explanation = pk.explain("ssd", **SSD_SPECS["train"].shapes())
    assert explanation.chosen == "xla"
    reason = "needs a CUDA device of compute capability 8.0 or later, the default device is a cpu"
    assert explanation.reasons["triton"] == reason


@pytest.mark.parametrize(
    "platform, capability, reason",
    [
        ("gpu", "8.0", None),
        ("gpu", "9.0", None),
        ("gpu", "12.0", None),
        ("gpu", "7.5", "needs a CUDA device of compute capability 8.0 or later, Some GPU has 7.5"),
        ("gpu", "gfx90a", "needs a CUDA device of compute capability 8.0 or later, Some GPU has gfx90a"),
        ("tpu", None, "needs a CUDA device of compute capability 8.0 or later, the default device is a tpu"),
    ],
)
def test_which_devices(monkeypatch, platform, capability, reason):
    device = types.SimpleNamespace(platform=platform, compute_capability=capability, device_kind="Some GPU")
    monkeypatch.setattr(jax, "devices", lambda: [device])
    monkeypatch.setitem(sys.modules, "jax_triton", types.SimpleNamespace(__version__="0.3.1"))
    assert backend.why_not_here() == reason
    if reason is None:
        monkeypatch.setitem(sys.modules, "jax_triton", None)
        assert "needs jax-triton 0.3, which cannot be imported" in backend.why_not_here()
        monkeypatch.setattr(jax, "devices", lambda: [device, device])
        assert "several devices" in backend.why_not_here()


@pytest.mark.parametrize(
    "batch, length, heads, groups", [(8, 2048, 80, 1), (1, 100, 80, 1), (1, 1, 3, 3), (4, 4096, 80, 8)]
)
def test_a_program_takes_heads_of_one_group(batch, length, heads, groups):
    block = plan.Plan(batch, length, heads, 64, groups, 128, exact=True, itemsize=2).block_heads
    assert heads // groups % block == 0
    assert block == 1 or batch * -(-length // 64) * heads // block >= plan.PROGRAMS
