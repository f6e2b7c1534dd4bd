"""Several walks over the same tokens, from the first to the last or backwards, each with parameters of its own.

Kernels that know walks read tokens where they lie, whichever way they go: nothing is flipped. Rows of their work are
those of all walks, one walk after the other: [k*b ..]. What all walks share has b rows.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax


class Walks(NamedTuple):
    """`number` walks: the first `forwards` of them from the first token on, the others from the last one back.

    With `grid`, (rows, columns) of a row-major grid, "the tokens" are its columns one after the other; only kernels that
    read or write the grid itself ask for it.
    """

    number: int = 1
    forwards: int = 1
    grid: tuple[int, int] | None = None

    def on_grid(self, place):
        """Where the token at `place` lies in the row-major grid."""
        if self.grid is None:
            return place
        rows, columns = self.grid
        return lax.rem(place, rows) * columns + lax.div(place, rows)

    def from_grid(self, place):
        """The inverse of `on_grid`."""
        if self.grid is None:
            return place
        rows, columns = self.grid
        return lax.rem(place, columns) * rows + lax.div(place, columns)

    def of(self, row, rows: int):
        """The number of the walk to which row number `row` of `rows` belongs."""
        return 0 if self.number == 1 else lax.div(row, rows // self.number)

    def backwards(self, row, rows: int):
        """Whether row number `row` of `rows` is walked from its end; a bool where that is the same for all of them."""
        if self.forwards in (0, self.number):
            return self.forwards == 0
        return row >= rows // self.number * self.forwards


ONE_WALK = Walks()


def choose(backwards, there, here):
    """`there` in a walk from the end, else `here`."""
    if isinstance(backwards, bool):
        return there if backwards else here
    return jnp.where(backwards, there, here)


def mirrored(backwards, number, count: int):
    """The place of what is met as the `number`-th of `count`; and the other way round."""
    return choose(backwards, count - 1 - number, number)


def shared(ref, row):
    """The row of `ref` that belongs to `row` of the work."""
    return lax.rem(row, ref.shape[0])
