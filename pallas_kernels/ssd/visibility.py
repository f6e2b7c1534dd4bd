"""Packed sequences inside a chunk: for each token the first token of its chunk that it sees."""

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Int

from pallas_kernels.segments import Segments

PADDING = 1024  # more than a chunk is long


def first_visible_tokens(segments: Segments, chunks: int, chunk: int) -> Int[Array, "b chunks chunk"]:
    """-1: it sees the state that enters the chunk too. The filled end of the last chunk is padding.

    Padding is `PADDING` more: it sees nothing, but still tells which sequence the row is in.
    """
    fill = ((0, 0), (0, chunks * chunk - segments.index.shape[1]))
    index, real = jnp.pad(segments.index, fill, mode="edge"), jnp.pad(segments.real, fill)
    starts = jnp.diff(index, axis=1, prepend=0) > 0
    position = jnp.arange(chunk, dtype=jnp.int32)[None, None]
    starts = jnp.where(starts.reshape(-1, chunks, chunk), position, -1)
    return lax.cummax(starts, axis=2) + jnp.where(real.reshape(starts.shape), 0, PADDING)
