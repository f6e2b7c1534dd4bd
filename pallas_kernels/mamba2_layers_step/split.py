"""How a product is split over thread blocks that never stop reading weights (stream-K, arXiv 2301.03598)."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

ROWS = 64  # of the weights in one tile
COLUMNS = 256


class Split(NamedTuple):
    """x [rows] @ weights [rows columns], cut into tiles of ROWS x COLUMNS that are numbered along the rows first.

    Each share has equally many neighbouring tiles, give or take one. So whoever has it multiplies with few columns of
    tiles, and the sums of one column of tiles lie in few parts: one for each share that reaches into it.
    """

    tall: int
    """Tiles one below the other."""
    wide: int
    """Tiles next to each other."""
    shares: int
    """No share is empty, but those from here on are."""

    @classmethod
    def of(cls, rows: int, columns: int, shares: int) -> "Split":
        tall, wide = -(-rows // ROWS), -(-columns // COLUMNS)
        return cls(tall, wide, min(shares, tall * wide))

    @property
    def tiles(self) -> int:
        return self.tall * self.wide

    def first(self, share):
        """The first tile of a share; the last one comes before the first of the next share."""
        share = min(share, self.shares) if isinstance(share, int) else jnp.minimum(share, self.shares)
        return _div(share * self.tiles, self.shares)

    def share(self, tile):
        """Which one has a tile."""
        return _div((tile + 1) * self.shares - 1, self.tiles)

    def parts(self, column):
        """(first share, number of shares) that have tiles of a column of tiles."""
        first = self.share(column * self.tall)
        return first, self.share(column * self.tall + self.tall - 1) - first + 1

    @property
    def most_parts(self) -> int:
        return max(self.parts(column)[1] for column in range(self.wide))

    @property
    def most_rows(self) -> int:
        """How many rows of tiles a share meets at most."""
        return min(self.tall, max(self.counts))

    @property
    def counts(self) -> list[int]:
        """Tiles of each share."""
        return [self.first(share + 1) - self.first(share) for share in range(self.shares)]


def _div(a, b):
    return a // b if isinstance(a, int) and isinstance(b, int) else lax.div(a, b)
