"""Numbers that belong to heads meet the lanes of those heads.

Two forms: *rows* [heads tokens], as they lie in memory, and *columns* [tokens heads].
"""

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.ssd.pallas_tpu.blocks import rows_by_rows
from pallas_kernels.ssd.pallas_tpu.layout import Layout


def over_lanes(columns: Array, layout: Layout) -> Array:
    """Each head's number in all of its lanes: [tokens heads] -> [tokens lanes]."""
    tiles = []
    for first in range(0, layout.block_heads, layout.tile_heads):
        shape = (columns.shape[0], layout.tile)
        tile = jnp.broadcast_to(columns[:, first : first + 1], shape)
        for i in range(1, layout.tile_heads):
            here = lax.broadcasted_iota(jnp.int32, shape, 1) >= i * layout.head_lanes
            tile = jnp.where(here, columns[:, first + i : first + i + 1], tile)
        tiles.append(tile)
    return jnp.concatenate(tiles, axis=1)


def only(head: int, tile: Array, layout: Layout) -> Array:
    """The tile [tokens lanes] with zeros in the lanes of all heads but one, counted from the tile's first."""
    if layout.tile_heads == 1:
        return tile
    lane = lax.broadcasted_iota(jnp.int32, tile.shape, 1)
    first = head * layout.head_lanes
    return jnp.where((lane >= first) & (lane < first + layout.head_lanes), tile, jnp.zeros_like(tile))


def sum_by_head(a: Array, layout: Layout) -> Array:
    """float32 [tokens lanes] -> rows [heads tokens], as a product with ones: the sum comes out as rows."""
    shape = (layout.block_heads, layout.block)
    lane = lax.broadcasted_iota(jnp.int32, shape, 1)
    first = lax.broadcasted_iota(jnp.int32, shape, 0) * layout.head_lanes
    belongs = (lane >= first) & (lane < first + layout.head_lanes)
    return rows_by_rows(belongs.astype(jnp.float32), a, lax.Precision.HIGHEST)
