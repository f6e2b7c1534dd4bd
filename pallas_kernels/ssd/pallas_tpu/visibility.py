"""Packed sequences inside a chunk: for each token the first token of its chunk that it sees.

-1: it sees the state that enters the chunk too. Padding is `PADDING` more: it sees nothing, but still tells which
sequence the row is in.
"""

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.segments import Segments
from pallas_kernels.ssd.pallas_tpu.layout import LARGEST_CHUNK, Layout

PADDING = 4 * LARGEST_CHUNK


def first_visible_tokens(segments: Segments, layout: Layout) -> Array:
    """int32 [b chunks 1 tokens]; the filled end is padding."""
    fill = ((0, 0), (0, layout.chunks * layout.chunk - layout.length))
    index, real = jnp.pad(segments.index, fill, mode="edge"), jnp.pad(segments.real, fill)
    starts = jnp.diff(index, axis=1, prepend=0) > 0
    by_chunk = (layout.batch, layout.chunks, 1, layout.chunk)
    position = jnp.arange(layout.chunk, dtype=jnp.int32)[None, None, None]
    starts = jnp.where(starts.reshape(by_chunk), position, -1)
    return lax.cummax(starts, axis=3) + jnp.where(real.reshape(by_chunk), 0, PADDING)


# In a kernel: `ref` is the chunk's row [1 tokens].


def seen(ref) -> Array:
    """As a column [tokens 1]."""
    return jnp.transpose(ref[...])


def sees_nothing(ref) -> Array:
    """Which tokens are padding, as a column."""
    return seen(ref) >= PADDING - 1


def start_of_last(ref) -> Array:
    """Where in its chunk the sequence starts that the chunk's last token belongs to; -1: before the chunk. [1 1]"""
    last = ref[:, -1:]
    return jnp.where(last >= PADDING - 1, last - PADDING, last)
