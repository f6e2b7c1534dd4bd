"""The Pallas TPU backend of `visual_scan`, in Pallas' interpreter: the walks fold into the heads of one scan."""

import functools

import jax
import pytest

import pallas_kernels as pk
from tests.kernels.compare import BOUNDS, assert_close, outputs_and_gradients
from tests.kernels.test_ssd_pallas_tpu import interpreted, quickly_compiled  # noqa: F401, fixtures
from tests.kernels.visual_scan_suite import problem

DIRECTIONS = ("rows_reversed", "columns")


@pytest.mark.usefixtures("interpreted")
def test_two_directions():
    arrays = problem((3, 6), 2, b=1, h=2, g=1)
    scan = functools.partial(pk.visual_scan, grid=(3, 6), directions=DIRECTIONS, dt_softplus=True)
    actual = outputs_and_gradients(functools.partial(scan, implementation="pallas_tpu", chunk_size=16), arrays)
    expected = outputs_and_gradients(functools.partial(scan, implementation="reference"), arrays, "float64")
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, BOUNDS["float32"])


def test_lowers_for_tpu_with_one_launch():
    arrays = problem((27, 27), 2, b=1, h=8, p=64, n=128, g=1, dtype="bfloat16")
    arrays = {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in arrays.items()}
    scan = functools.partial(pk.visual_scan, grid=(27, 27), directions=DIRECTIONS, implementation="pallas_tpu")
    exported = jax.export.export(jax.jit(lambda arrays: scan(**arrays)), platforms=["tpu"])(arrays)
    assert exported.mlir_module().count("@tpu_custom_call") == 1


def test_what_it_refuses():
    options = {"grid": (2, 3), "directions": DIRECTIONS, "implementation": ("pallas_tpu", "xla")}
    explained = pk.explain("visual_scan", **problem((2, 3), 2, b=1, dtype="float16"), **options)
    assert explained.chosen == "xla" and explained.reasons["pallas_tpu"].startswith("x is float16")
    assert pk.explain("visual_scan", **problem((2, 3), 2, b=1), **options).chosen == "pallas_tpu"
