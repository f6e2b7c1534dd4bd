"""The visual scan backends, the orders of their walks, and their error messages."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from pallas_kernels.visual_scan.directions import from_scan_order, to_scan_order
from tests.kernels.compare import on_device
from tests.kernels.visual_scan_suite import ALL, VisualScanSuite, problem


class TestXLA(VisualScanSuite):
    implementation = "xla"


class TestReference(VisualScanSuite):
    """The oracle in float32 passes its own suite: `test_against_flips_and_transposes` is what proves it."""

    implementation = "reference"

    # Against itself in float64 these would only repeat what the other backends are checked for.
    test_directions = test_grids = test_merge = test_without_optional_arguments = test_dt_limit_and_chunk_size = None


def test_chunk_size_reaches_the_scan():
    scan = functools.partial(pk.visual_scan, grid=(5, 7), directions=ALL, implementation="xla")
    for chunk_size, chunks in ((5, 7), (12, 3)):
        jaxpr = jax.make_jaxpr(lambda arrays, size=chunk_size: scan(**arrays, chunk_size=size))(on_device(problem()))
        assert f"length={chunks}\n" in str(jaxpr)


@pytest.mark.parametrize(
    "direction, expected",
    [
        ("rows", [0, 1, 2, 3, 4, 5]),
        ("rows_reversed", [5, 4, 3, 2, 1, 0]),
        ("columns", [0, 3, 1, 4, 2, 5]),
        ("columns_reversed", [5, 2, 4, 1, 3, 0]),
    ],
)
def test_scan_order(direction, expected):
    order = pk.scan_order(direction, (2, 3))
    assert order.tolist() == expected
    a = jnp.arange(2 * 6 * 2).reshape(2, 6, 2)
    walked = to_scan_order(a, direction, (2, 3))
    np.testing.assert_array_equal(walked, a[:, order])
    np.testing.assert_array_equal(from_scan_order(walked, direction, (2, 3)), a)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"grid": (5, 6)}, "grid: got 5 x 6 = 30 patches, expected l = 35"),
        ({"directions": ("rows", "up", "rows", "rows")}, "directions: got 'up', expected names from rows, "),
        ({"directions": ()}, "directions: got none"),
        ({"merge": "max"}, "merge: got 'max', expected 'mean', 'sum' or None"),
        ({"A": np.zeros((3, 4), np.float32)}, r"A: got shape \(3, 4\), expected \[k h\] = \(4, 4\)"),
        ({"dt": np.zeros((2, 35, 3), np.float32)}, "dt: got shape"),
        ({"C": np.zeros((2, 35, 2, 5), np.float32)}, "C: got shape"),
        ({"D": np.zeros((4, 3), np.float32)}, "D: got shape"),
        ({"dt_bias": np.zeros((4, 3), np.float32)}, "dt_bias: got shape"),
        ({"conv_weight": np.zeros((4, 31, 4), np.float32)}, "conv_weight: got shape"),
        ({"conv_bias": np.zeros((4, 31), np.float32)}, "conv_bias: got shape"),
        ({"conv_weight": None}, "conv_bias: got one without conv_weight"),
        ({"chunk_size": 0}, "chunk_size: got 0"),
        ({"x": np.zeros((2, 35, 16), np.float32)}, r"x: got shape \(2, 35, 16\), expected \[b l h p\]"),
    ],
)
def test_wrong_arguments(changes, message, unchecked):
    with pytest.raises(ValueError, match=message):
        unchecked(pk.visual_scan)(**problem() | {"grid": (5, 7), "directions": ALL} | changes)
