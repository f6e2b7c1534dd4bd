"""The Mosaic GPU backend of `visual_scan`: for real with `-m gpu`; on a CPU all but its kernels, and that these lower."""

import jax
import jax.numpy as jnp
import pytest

import pallas_kernels as pk
from pallas_kernels.ssd.pallas_gpu import backward, exponents, forward
from pallas_kernels.visual_scan import pallas_gpu, walked
from tests.kernels import conv_emulation, gradient_emulation, walk_emulation
from tests.kernels.compare import BOUNDS
from tests.kernels.test_ssd_pallas_gpu import export
from tests.kernels.visual_scan_suite import ALL, VisualScanSuite, problem, without


@pytest.mark.gpu
class TestPallasGPU(VisualScanSuite):
    """float32 problems are handed to the kernels in bfloat16."""

    implementation = "pallas_gpu"
    bounds = BOUNDS | {"float32": BOUNDS["bfloat16"]}

    def scan(self, **options):
        dtype = options["x"].dtype
        if dtype == jnp.float32:
            options |= {name: jnp.asarray(options[name], jnp.bfloat16) for name in ("x", "B", "C")}
        return super().scan(**options).astype(dtype)


@pytest.fixture
def emulated_kernels(monkeypatch):
    """The kernels replaced by their emulations, which take float32 as well."""
    monkeypatch.setattr(exponents, "cumulated", walk_emulation.cumulated)
    monkeypatch.setattr(forward, "walk", walk_emulation.walk)
    monkeypatch.setattr(forward, "states_of_parts", walk_emulation.states_of_parts)
    monkeypatch.setattr(backward, "boundary_states", gradient_emulation.boundary_states)
    monkeypatch.setattr(backward, "chunk_gradients", gradient_emulation.chunk_gradients)
    monkeypatch.setattr(backward, "log_decay_gradients", gradient_emulation.log_decay_gradients)
    monkeypatch.setattr(walked, "convolve", conv_emulation.convolve)
    monkeypatch.setattr(walked, "convolve_backward", conv_emulation.convolve_backward)
    monkeypatch.setattr(pallas_gpu, "why_not_visual_scan", lambda *args, **kwargs: None)


@pytest.mark.usefixtures("emulated_kernels")
class TestAroundTheKernels(VisualScanSuite):
    """Fewer cases than on a GPU; 132 patches are three chunks, the last one ragged."""

    implementation = "pallas_gpu"
    test_directions = test_grids = test_dtypes = test_dt_limit_and_chunk_size = None

    @pytest.mark.parametrize("directions", [ALL[1:2], ALL[::-1]], ids=len)
    def test_grids_of_several_chunks(self, directions):
        arrays = problem((11, 12), len(directions))
        self.check(arrays, grid=(11, 12), directions=directions, dt_limit=(0.05, 0.4))

    def test_merge(self):
        self.check(without(problem(D="h p"), "conv_bias", "dt_bias"), merge=None)

    @pytest.mark.parametrize("omitted", [("conv_weight", "conv_bias")])
    def test_without_optional_arguments(self, omitted):
        self.check(without(problem(), *omitted), merge="sum")


def abstract(dtype="bfloat16", *, grid=(27, 27), directions=ALL[:2], **sizes):
    arrays = problem(grid, len(directions), **{"b": 8, "h": 80, "p": 64, "n": 128, "g": 1, "dtype": dtype} | sizes)
    return {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in arrays.items()}


@pytest.mark.parametrize("directions", [ALL[:2], ALL], ids=len)
def test_lowers_for_cuda_with_one_launch_along_rows_and_one_along_columns(directions):
    options = {"grid": (27, 27), "directions": directions, "dt_softplus": True, "implementation": "pallas_gpu"}

    def loss(arrays):
        return jnp.sum(pk.visual_scan(**arrays, **options).astype(jnp.float32))

    arrays = abstract(directions=directions)
    text = export(lambda arrays: pk.visual_scan(**arrays, **options), arrays)
    # The convolution of x and of B and C, exponents, walk.
    assert text.count("@mosaic_gpu") == 4 * (len(directions) // 2)
    assert "causal_conv1d" in text and "ssd_walk" in text
    assert "ssd_gradients" in export(jax.grad(loss), arrays)


@pytest.mark.parametrize(
    "arrays, reason",
    [
        (abstract("float32", b=1), "x is float32; the kernel multiplies bfloat16 or float16"),
        (abstract(p=96, b=1), "heads are 96 wide"),
        (
            abstract(b=1) | {"conv_weight": jax.ShapeDtypeStruct((2, 5376, 5), jnp.float32)},
            "the convolution has 5 taps",
        ),
    ],
)
def test_what_the_kernels_refuse(arrays, reason):
    options = {"grid": (27, 27), "directions": ALL[:2]}
    assert pallas_gpu.why_not_visual_scan(**arrays, **options).startswith(reason)
    explained = pk.explain("visual_scan", **arrays, **options)
    assert explained.chosen == "xla" and "the default device is a cpu" in explained.reasons["pallas_gpu"]


def test_without_a_convolution_only_the_scan_is_asked():
    arrays = without(abstract(b=1), "conv_weight", "conv_bias")
    assert pallas_gpu.why_not_visual_scan(**arrays, grid=(27, 27), directions=ALL[:2]) is None
