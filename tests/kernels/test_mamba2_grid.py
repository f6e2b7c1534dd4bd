"""A grid of patches through a mixer: against the oracles of its parts, forward and gradient, and what it refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from pallas_kernels.mamba2_grid import pallas_gpu
from pallas_kernels.ssd.pallas_gpu import backward, exponents, forward
from pallas_kernels.visual_scan import walked
from tests.kernels import conv_emulation, gradient_emulation, merged_norm_emulation, walk_emulation
from tests.kernels.compare import assert_as_exact, outputs_and_gradients
from tests.kernels.mamba2_grid_suite import ALL, Mamba2GridSuite, problem
from tests.kernels.test_ssd_pallas_gpu import export


class TestXLA(Mamba2GridSuite):
    """Its parts have their own suites; here only that they fit together."""

    implementation = "xla"
    test_directions = test_without_optional_arguments = test_dtypes = None


@pytest.fixture
def emulated_kernels(monkeypatch):
    """The kernels replaced by their emulations, which take float32 and groups of any width as well."""
    monkeypatch.setattr(exponents, "cumulated", walk_emulation.cumulated)
    monkeypatch.setattr(forward, "walk", walk_emulation.walk)
    monkeypatch.setattr(forward, "states_of_parts", walk_emulation.states_of_parts)
    monkeypatch.setattr(backward, "boundary_states", gradient_emulation.boundary_states)
    monkeypatch.setattr(backward, "chunk_gradients", gradient_emulation.chunk_gradients)
    monkeypatch.setattr(backward, "log_decay_gradients", gradient_emulation.log_decay_gradients)
    monkeypatch.setattr(walked, "convolve", conv_emulation.convolve)
    monkeypatch.setattr(walked, "convolve_backward", conv_emulation.convolve_backward)
    monkeypatch.setattr(pallas_gpu, "normalize_and_merge", merged_norm_emulation.normalize_and_merge)
    monkeypatch.setattr(pallas_gpu, "normalize_and_merge_backward", merged_norm_emulation.normalize_and_merge_backward)
    monkeypatch.setattr(pallas_gpu, "why_not_mamba2_grid", lambda *args, **kwargs: None)


@pytest.mark.usefixtures("emulated_kernels")
class TestAroundTheKernels(Mamba2GridSuite):
    """Fewer cases than on a GPU: what `visual_scan` shares is tested there."""

    implementation = "pallas_gpu"
    test_dtypes = None

    def test_directions(self):
        super().test_directions(ALL[::-1])


@pytest.mark.gpu
class TestPallasGPU(Mamba2GridSuite):
    """On wider problems, float32 ones in bfloat16; what the kernels may be off, XLA in the same dtype tells."""

    implementation = "pallas_gpu"

    def check(self, arrays, *, dtype="float32", **options):
        dtype = "bfloat16" if dtype == "float32" else dtype
        options = {"grid": (5, 7), "directions": ALL, "groups": 2} | options
        k, groups = len(options["directions"]), options["groups"]
        by_channel = "h p" if arrays.get("D", arrays["A"]).ndim == 3 else "h"
        wide = problem(options["grid"], k, 2, 4, 64, 64, groups, D=by_channel, dtype=dtype)
        arrays = {name: a for name, a in wide.items() if name in arrays}

        def results(implementation, exact_dtype=None):
            function = functools.partial(pk.mamba2_grid, implementation=implementation, **options)
            outputs, gradients = outputs_and_gradients(function, arrays, exact_dtype)
            return outputs | gradients

        ours, xla, exact = results("pallas_gpu"), results("xla"), results("reference", "float64")
        # As for `mamba2_sequence`: a few numbers, sums in which roundings nearly cancel.
        few = {f"gradient of {name}" for name in ("A", "dt_bias")}
        assert_as_exact(ours, xla, {name: a for name, a in exact.items() if name not in few}, dtype, units=0.5)
        assert_as_exact(ours, xla, {name: a for name, a in exact.items() if name in few}, dtype, units=2)

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_dtypes(self, dtype):
        self.check(problem(b=1, k=2), dtype=dtype, directions=ALL[:2])

    @pytest.mark.parametrize("grid", [(16, 16), (14, 20), (27, 27)])
    def test_grids(self, grid):
        self.check(problem(grid, b=1), grid=grid)

    def test_bit_identical_on_repetition(self):
        arrays = problem((9, 10), h=4, p=64, n=64, g=1, dtype="bfloat16")
        function = functools.partial(self.mixer, grid=(9, 10), directions=ALL)
        first, second = (outputs_and_gradients(function, arrays) for _ in range(2))
        for a, b in zip(first, second, strict=True):
            for name in a:
                assert (a[name] == b[name]).all(), name


# On a machine without a GPU.


def abstract(dtype="bfloat16", *, k=2, **sizes) -> dict:
    arrays = problem((27, 27), k, **{"b": 1, "h": 4, "p": 64, "n": 64, "g": 1, "dtype": dtype} | sizes)
    return {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in arrays.items()}


def test_lowers_for_cuda_without_copies():
    arrays = abstract(k=4, h=80, n=128)

    def loss(arrays):
        options = {"grid": (27, 27), "directions": ALL, "implementation": "pallas_gpu"}
        return jnp.sum(pk.mamba2_grid(**arrays, **options).astype(jnp.float32))

    text = export(loss, arrays)
    # Two convolutions, exponents and walk along the rows, as many along the columns; the norm.
    assert text.count("@mosaic_gpu") == 2 * 4 + 1
    slices = [line.split("->")[-1] for line in text.splitlines() if "stablehlo.slice" in line]
    assert not any("x5120xbf16>" in result for result in slices)  # neither z nor x is cut out
    text = export(jax.grad(loss), arrays)
    for kernel in ("ssd_gradients", "causal_conv1d_gradient", "gated_rms_norm_merged_gradient"):
        assert kernel in text


def test_without_its_kernels_each_part_chooses_its_own(monkeypatch):
    arrays = {name: jnp.asarray(a) for name, a in problem(g=1).items()}
    mixer = functools.partial(pk.mamba2_grid, grid=(5, 7), directions=ALL)
    explained = pk.explain("mamba2_grid", **arrays, grid=(5, 7), directions=ALL)
    assert explained.chosen == "xla" and "the default device is a cpu" in explained.reasons["pallas_gpu"]
    seen, run = [], type(pk.OPS["ssd"])._run
    monkeypatch.setattr(
        type(pk.OPS["ssd"]), "_run", lambda op, i, *a, **k: (seen.append((op.name, i)), run(op, i, *a, **k))[1]
    )
    for implementation in (None, ("pallas_gpu", "reference")):  # x is float32
        seen.clear()
        jax.eval_shape(lambda arrays, i=implementation: mixer(**arrays, implementation=i), arrays)
        assert seen == [("visual_scan", implementation), ("gated_rms_norm", implementation)]


@pytest.mark.parametrize(
    "sizes, reason",
    [
        ({"dtype": "float32"}, "x is float32; the kernel multiplies bfloat16 or float16"),
        ({"n": 200}, "the state size is 200; the kernel of the gradient takes up to 128"),
        ({"w": 5}, "the convolution has 5 taps"),
        ({"h": 3, "p": 32}, "a group has 96 channels"),
    ],
)
def test_what_the_kernels_refuse(sizes, reason):
    arrays = abstract(**sizes)
    assert pallas_gpu.why_not_mamba2_grid(**arrays, grid=(27, 27), directions=ALL[:2]).startswith(reason)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"grid": (5, 6)}, "grid: got 5 x 6 = 30 patches, expected l = 35"),
        ({"directions": ("rows", "up", "rows", "rows")}, "directions: got 'up'"),
        ({"directions": ALL[:3]}, r"A: got shape \(4, 4\), expected \[k h\] = \(3, 4\)"),
        ({"merge": None}, "merge: got None, expected 'mean' or 'sum'"),
        ({"groups": 3}, "zxbcdt: got "),
        ({"D": np.zeros((4, 3), np.float32)}, "D: got shape"),
        ({"dt_bias": np.zeros((4, 3), np.float32)}, "dt_bias: got shape"),
        ({"norm_weight": np.zeros(15, np.float32)}, "norm_weight: got shape"),
        ({"conv_bias": np.zeros((4, 31), np.float32)}, "conv_bias: got shape"),
        ({"conv_weight": np.zeros((4, 32), np.float32)}, "conv_weight: got shape"),
        ({"zxbcdt": np.zeros((2, 35), np.float32)}, "zxbcdt: got shape"),
    ],
)
def test_wrong_arguments(changes, message, unchecked):
    options = {"grid": (5, 7), "directions": ALL, "groups": 2}
    with pytest.raises(ValueError, match=message):
        unchecked(pk.mamba2_grid)(**problem() | options | changes)
