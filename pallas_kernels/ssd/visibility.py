"""Packed sequences inside a chunk: for each token the first token of its chunk that it sees.

-1: it sees the state that enters the chunk too. Padding is `PADDING` more: it sees nothing, but still tells which
sequence the row is in.
"""

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Int

from pallas_kernels.segments import Segments

PADDING = 1024  # more than any chunk is long


def first_visible_tokens(segments: Segments, chunks: int, chunk: int) -> Int[Array, "b chunks chunk"]:
    """Of every token; the filled end of the last chunk is padding."""
    fill = ((0, 0), (0, chunks * chunk - segments.index.shape[1]))
    index, real = jnp.pad(segments.index, fill, mode="edge"), jnp.pad(segments.real, fill)
    starts = jnp.diff(index, axis=1, prepend=0) > 0
    position = jnp.arange(chunk, dtype=jnp.int32)[None, None]
    starts = jnp.where(starts.reshape(-1, chunks, chunk), position, -1)
    return lax.cummax(starts, axis=2) + jnp.where(real.reshape(starts.shape), 0, PADDING)


def start_of_sequence(first_visible):
    """Where in its chunk the sequence starts that a token belongs to, padding or not; -1: before the chunk."""
    return jnp.where(first_visible < PADDING - 1, first_visible, first_visible - PADDING)
