"""Packed sequences: what `segment_ids` mean, in one place for every kernel.

A row of tokens may hold several sequences one after the other. `segment_ids` [b l] names the sequence each token
belongs to:

* where the id differs from that of the last real token, a new sequence starts: state and convolution window begin
  empty;
* a negative id marks padding: such a token changes no state, its output is zero, and it starts nothing;
* an initial state belongs to the first sequence of its row, and the final state is the one after the last real token
  of the row.

Padding may stand anywhere, but a convolution window that reaches back over padding reads zeros there, so rows that
continue from an initial state are padded on the right.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Int


class Segments(NamedTuple):
    """Per token [b l]: `index` counts the sequences of its row from 0, `real` is false on padding."""

    index: Int[Array, "b l"]
    real: Bool[Array, "b l"]


class Ends(NamedTuple):
    """Of the real tokens of each row [b]: the first and the last id, -1 where there are none, and whether the last
    token still belongs to the first sequence."""

    first: Int[Array, "b"]
    last: Int[Array, "b"]
    unbroken: Bool[Array, "b"]


def find_ends(segment_ids: Int[Array, "b l"], segments: Segments) -> Ends:
    """What a piece of a row has to tell its neighbours."""

    def first(ids):
        found = jnp.argmax(ids >= 0, axis=1)
        return jnp.maximum(jnp.take_along_axis(ids, found[:, None], axis=1)[:, 0], -1)

    return Ends(first(segment_ids), first(segment_ids[:, ::-1]), segments.index[:, -1] == 0)


def number_segments(segment_ids: Int[Array, "b l"]) -> Segments:
    """Turn arbitrary ids into running numbers: two tokens see each other exactly when their numbers are equal."""
    length = segment_ids.shape[1]
    real = segment_ids >= 0
    position = jnp.arange(length, dtype=jnp.int32)[None]
    last_real = lax.cummax(jnp.where(real, position, -1), axis=1)
    before = jnp.pad(last_real[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    previous_id = jnp.take_along_axis(segment_ids, jnp.maximum(before, 0), axis=1)
    starts = real & (before >= 0) & (segment_ids != previous_id)
    return Segments(jnp.cumsum(starts.astype(jnp.int32), axis=1), real)
