"""What XLA computes before the Mosaic GPU kernels run: decays as exponents of 2 (Mosaic GPU has no cumulative sum).

    s_i = log2(e) * sum of d_t A up to token i of its chunk
    u_j = s_j - log2(d_j)              so that 2^(s_i - u_j) = exp(sum of d_t A from j+1 to i) d_j, and 0 where d_j is 0

which covers padding and the ragged end (d = 0) without a mask. Differences are never positive where they are used, so
nothing overflows. Packed sequences add one integer for each token, see `first_visible_tokens`.
"""

import math

import jax.numpy as jnp
from jax import lax

from pallas_kernels.segments import number_segments
from pallas_kernels.ssd.discretize import discretize
from pallas_kernels.ssd.pallas_gpu.tiles import CHUNK


def prepare(dt, A, dt_bias, dt_softplus, dt_limit, segment_ids, chunks: int):
    """The exponents s and u [b h chunks 2 64], and for packed sequences `first_visible_tokens` [b chunks 64]."""
    segments = None if segment_ids is None else number_segments(segment_ids)
    steps = step_sizes(dt, dt_bias, dt_softplus, dt_limit, segments)
    s, u, _ = _cumulated(steps, A, chunks)
    return jnp.stack([s, u], axis=3), None if segments is None else first_visible_tokens(segments, chunks)


def prepare_backward(steps, A, segments, chunks: int):
    """What the backward kernels read, [b h chunks rows 64] with the rows named below, and `first_visible_tokens`.

    `steps` [b l h] are those of `step_sizes`. How much of the state that enters the chunk token i sees is
    2^from_state_i (of the last token: how much of it leaves the chunk), how much of what token j writes leaves it is
    2^to_end_j d_j. Both are -inf where packed sequences do not let anything through.
    """
    s, u, d = _cumulated(steps, A, chunks)
    last = s[..., -1:]
    from_state, to_end, written, first_visible = s, last - s, last - u, None
    if segments is not None:
        first_visible = first_visible_tokens(segments, chunks)
        start = start_of_sequence(first_visible)
        stays = (jnp.arange(CHUNK, dtype=jnp.int32)[None, None] >= start[..., -1:])[:, None]
        from_state = jnp.where((start < 0)[:, None], s, -jnp.inf)
        to_end, written = (jnp.where(stays, a, -jnp.inf) for a in (to_end, written))
    return jnp.stack([s, from_state, to_end, written, d], axis=3), first_visible


S, FROM_STATE, TO_END, WRITTEN, STEP = range(5)  # the rows of `prepare_backward`; 2^written_j = 2^to_end_j d_j


def step_sizes(dt, dt_bias, dt_softplus, dt_limit, segments):
    """d [b l h] in float32, 0 on padding."""
    steps = discretize(dt, dt_bias, dt_softplus, dt_limit, jnp.float32)
    return steps if segments is None else jnp.where(segments.real[..., None], steps, 0)


def by_chunk(a, chunks: int):
    """[b l h] -> [b h chunks 64], zeros behind the end."""
    a = jnp.pad(a, ((0, 0), (0, chunks * CHUNK - a.shape[1]), (0, 0)))
    return jnp.swapaxes(a, 1, 2).reshape(a.shape[0], a.shape[2], chunks, CHUNK)


def _cumulated(steps, A, chunks: int):
    """s, u and d, each [b h chunks 64]."""
    d = by_chunk(steps, chunks)
    # The cumulative sum as a matrix product, which is one fast kernel; summed before A and log2(e) scale it.
    upper = jnp.triu(jnp.ones((CHUNK, CHUNK), jnp.float32))
    s = jnp.einsum("bhcj,ji->bhci", d, upper, precision=lax.Precision.HIGHEST)
    s = s * (A.astype(jnp.float32) * math.log2(math.e))[None, :, None, None]
    return s, s - jnp.log2(d), d


def first_visible_tokens(segments, chunks: int):
    """For each token the first token of its chunk that it sees, [b chunks 64].

    -1: it sees the state that enters the chunk too. Padding is `PADDING` more: it sees nothing, but still tells which
    sequence the row is in.
    """
    index = jnp.pad(segments.index, ((0, 0), (0, chunks * CHUNK - segments.index.shape[1])), mode="edge")
    real = jnp.pad(segments.real, ((0, 0), (0, chunks * CHUNK - segments.real.shape[1])))
    starts = jnp.diff(index, axis=1, prepend=0) > 0
    position = jnp.arange(CHUNK, dtype=jnp.int32)[None, None]
    starts = jnp.where(starts.reshape(-1, chunks, CHUNK), position, -1)
    return lax.cummax(starts, axis=2) + jnp.where(real.reshape(starts.shape), 0, PADDING)


PADDING = 1024


def start_of_sequence(first_visible):
    """Where in its chunk the sequence starts that a token belongs to; -1: before the chunk."""
    return jnp.where(first_visible < CHUNK, first_visible, first_visible - PADDING)


def by_part(factors, first_visible, plan):
    """For the walk that only adds up states: how much of each token, and of the state before, is left where a part ends.

    Returns exponents of 2 for the tokens [b h chunks 1 64], and factors for the states [b parts heads].
    """

    def by_part(a):
        return a.reshape(*a.shape[:-1], plan.parts, plan.chunks_per_part)

    last = factors[:, :, :, 0, -1]
    total = lax.cumsum(by_part(last), axis=3, reverse=True).reshape(last.shape)  # from this chunk's start on
    to_end = total[..., None] - factors[:, :, :, 1]
    kept = jnp.exp2(jnp.swapaxes(by_part(total)[..., 0], 1, 2))
    if first_visible is not None:
        start = start_of_sequence(first_visible[:, :, -1])
        starts = by_part(start >= 0).astype(jnp.int32)
        later = lax.cumsum(starts, axis=2, reverse=True) - starts  # sequences that start in later chunks of the part
        position = jnp.arange(CHUNK, dtype=jnp.int32)[None, None]
        stays = (position >= start[..., None]) & (later.reshape(start.shape) == 0)[..., None]
        to_end = jnp.where(stays[:, None], to_end, -jnp.inf)
        kept = jnp.where((starts.sum(axis=2) == 0)[..., None], kept, 0)
    return to_end[:, :, :, None], kept
