"""The orders in which a grid of image patches can be walked.

Patches are stored row-major (as ViTs produce them). A direction names a walk over the grid; the cross scan of VMamba
(arXiv 2401.10166) uses all four, the bidirectional scan of ML-Mamba (arXiv 2407.19832, figure 4) the first two.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jax import Array

from pallas_kernels.walks import Walks

DIRECTIONS = ("rows", "rows_reversed", "columns", "columns_reversed")


class Bundle(NamedTuple):
    """Directions for which the patches lie in memory alike, as walks over them: those backwards are the last."""

    walks: Walks
    numbers: tuple[int, ...]
    """Of the directions, among all of them."""

    def from_grid(self, a: Array) -> Array:
        """Row-major patches [b l ..] as they lie for these walks: nothing moves where the walks go along rows."""
        return a if self.walks.grid is None else to_scan_order(a, "columns", self.walks.grid)

    def to_grid(self, a: Array) -> Array:
        """The inverse of `from_grid`."""
        return a if self.walks.grid is None else from_scan_order(a, "columns", self.walks.grid)


def bundles(directions: Sequence[str], grid: tuple[int, int]) -> list[Bundle]:
    """All `directions`, at most one bundle along rows and one along columns."""
    found = []
    for along, lies in (("rows", None), ("columns", grid)):
        numbers = [i for i, name in enumerate(directions) if name.startswith(along)]
        numbers.sort(key=lambda i: directions[i].endswith("reversed"))
        forwards = sum(not directions[i].endswith("reversed") for i in numbers)
        if numbers:
            found.append(Bundle(Walks(len(numbers), forwards, lies), tuple(numbers)))
    return found


def scan_order(direction: str, grid: tuple[int, int]) -> np.ndarray:
    """order[t] is the row-major index of the patch that is visited at time t; int32 [rows * columns]."""
    return to_scan_order(np.arange(grid[0] * grid[1], dtype=np.int32), direction, grid, axis=0)


def to_scan_order(a: Array | np.ndarray, direction: str, grid: tuple[int, int], axis: int = 1) -> Array | np.ndarray:
    """Reorder the row-major patch axis of `a` into the order of `direction`."""
    if direction.startswith("columns"):
        a = _swap_grid(a, grid, axis)
    return _reverse(a, axis) if direction.endswith("reversed") else a


def from_scan_order(a: Array | np.ndarray, direction: str, grid: tuple[int, int], axis: int = 1) -> Array | np.ndarray:
    """The inverse of `to_scan_order`."""
    if direction.endswith("reversed"):
        a = _reverse(a, axis)
    return _swap_grid(a, grid[::-1], axis) if direction.startswith("columns") else a


def _reverse(a: Array | np.ndarray, axis: int) -> Array | np.ndarray:
    return a[(slice(None),) * axis + (slice(None, None, -1),)]


def _swap_grid(a: Array | np.ndarray, grid: tuple[int, int], axis: int) -> Array | np.ndarray:
    shape = a.shape
    return a.reshape(*shape[:axis], *grid, *shape[axis + 1 :]).swapaxes(axis, axis + 1).reshape(shape)
