"""How a product is split over thread blocks that never stop reading weights (stream-K, arXiv 2301.03598)."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

ROWS = 64  # of the weights in one tile
COLUMNS = 256


class Split(NamedTuple):
    """x [rows] @ weights [rows columns], cut into tiles of ROWS x COLUMNS that are numbered along the rows first.

    Each block takes equally many neighbouring tiles, give or take one. So it multiplies with few columns of tiles, and
    the sums of one column of tiles lie in few parts: one for each block that had a share in it. No block of `blocks` is
    without a tile; those that are numbered beyond it are.
    """

    tall: int
    """Tiles one below the other."""
    wide: int
    """Tiles next to each other."""
    blocks: int

    @classmethod
    def of(cls, rows: int, columns: int, blocks: int) -> "Split":
        tall, wide = -(-rows // ROWS), -(-columns // COLUMNS)
        return cls(tall, wide, min(blocks, tall * wide))

    @property
    def tiles(self) -> int:
        return self.tall * self.wide

    def first(self, block):
        """The first tile of a block; the last one comes before the first of the next block."""
        block = min(block, self.blocks) if isinstance(block, int) else jnp.minimum(block, self.blocks)
        return _div(block * self.tiles, self.blocks)

    def block(self, tile):
        """Who has a tile."""
        return _div((tile + 1) * self.blocks - 1, self.tiles)

    def parts(self, column):
        """(first block, number of blocks) that have tiles of a column of tiles."""
        first = self.block(column * self.tall)
        return first, self.block(column * self.tall + self.tall - 1) - first + 1

    @property
    def most_parts(self) -> int:
        return max(self.parts(column)[1] for column in range(self.wide))

    @property
    def most_rows(self) -> int:
        """How many rows of tiles a block meets at most."""
        most = max(self.first(block + 1) - self.first(block) for block in range(self.blocks))
        return min(self.tall, most)


def _div(a, b):
    return a // b if isinstance(a, int) and isinstance(b, int) else lax.div(a, b)
