"""The Mosaic GPU backend of `visual_scan`: for real with `-m gpu`; on a CPU that it lowers, and what it refuses."""

import jax
import jax.numpy as jnp
import pytest

import pallas_kernels as pk
from pallas_kernels.visual_scan import pallas_gpu
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


def abstract(dtype="bfloat16", *, grid=(27, 27), directions=ALL[:2], **sizes):
    arrays = problem(grid, len(directions), **{"b": 8, "h": 80, "p": 64, "n": 128, "g": 1, "dtype": dtype} | sizes)
    return {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in arrays.items()}


@pytest.mark.parametrize("directions", [ALL[:2], ALL], ids=len)
def test_lowers_for_cuda_with_one_launch_for_all_directions(directions):
    options = {"grid": (27, 27), "directions": directions, "dt_softplus": True, "implementation": "pallas_gpu"}

    def loss(arrays):
        return jnp.sum(pk.visual_scan(**arrays, **options).astype(jnp.float32))

    arrays = abstract(directions=directions)
    forward = export(lambda arrays: pk.visual_scan(**arrays, **options), arrays)
    assert forward.count("@mosaic_gpu") == 3  # convolution, exponents, walk
    assert "causal_conv1d" in forward and "ssd_walk" in forward
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
