"""What is known before the matrix products: step sizes, and decays as exponents of 2, chunk by chunk.

    s_i = log2(e) * sum of d_t A up to token i of its chunk
    u_j = s_j - log2(d_j)              so that 2^(s_i - u_j) = exp(sum of d_t A from j+1 to i) d_j, and 0 where d_j is 0

which covers padding and the ragged end (d = 0) without a mask. Differences are never positive where they are used, so
nothing overflows. XLA computes the step sizes, a small kernel adds them up. Packed sequences add one integer for each
token, see `visibility`.

Chunks are those of the tokens in memory. In a walk from the end (`pallas_kernels.walks`) "up to token i" means from the
last token of the chunk down to it, and the chunk ends with its first token: s_0 is what s_63 is above.
"""

import functools
import math

import jax.numpy as jnp

from pallas_kernels.hopper import load
from pallas_kernels.segments import number_segments
from pallas_kernels.ssd.discretize import discretize
from pallas_kernels.ssd.pallas_gpu.chunk_sums import over_chunks, positions, product_with_ones
from pallas_kernels.ssd.pallas_gpu.tiles import CHUNK, MATRIX, ROWS, rows
from pallas_kernels.ssd.visibility import first_visible_tokens, start_of_sequence
from pallas_kernels.walks import ONE_WALK, Walks, choose


def prepare(dt, A, dt_bias, dt_softplus, dt_limit, segment_ids, chunks: int, walks: Walks = ONE_WALK):
    """The exponents s and u [b h chunks 2 64], and for packed sequences `first_visible_tokens` [b chunks 64]."""
    segments = None if segment_ids is None else number_segments(segment_ids)
    steps = step_sizes(dt, dt_bias, dt_softplus, dt_limit, segments, walks)
    factors = cumulated(by_chunk(steps, chunks), _rates(A, steps), ("s", "u"), walks)
    return factors, None if segments is None else first_visible_tokens(segments, chunks, CHUNK)


def prepare_backward(steps, A, segments, chunks: int, walks: Walks = ONE_WALK):
    """What the backward kernels read, [b h chunks rows 64] with the rows named below, and `first_visible_tokens`.

    `steps` [b l h] are those of `step_sizes`. How much of the state that enters the chunk token i sees is
    2^from_state_i (of the last token: how much of it leaves the chunk), how much of what token j writes leaves it is
    2^to_end_j d_j. Both are -inf where packed sequences do not let anything through.
    """
    factors = cumulated(by_chunk(steps, chunks), _rates(A, steps), ("s", "s", "to_end", "written", "d"), walks)
    if segments is None:
        return factors, None
    first_visible = first_visible_tokens(segments, chunks, CHUNK)
    start = start_of_sequence(first_visible)
    position = jnp.arange(CHUNK, dtype=jnp.int32)[None, None]
    enters, stays = start < 0, position >= start[..., -1:]
    everything = jnp.ones_like(stays)
    passes = jnp.stack([everything, enters, stays, stays, everything], axis=2)[:, None]
    return jnp.where(passes, factors, -jnp.inf), first_visible


S, FROM_STATE, TO_END, WRITTEN, STEP = range(5)  # the rows of `prepare_backward`; 2^written_j = 2^to_end_j d_j


def step_sizes(dt, dt_bias, dt_softplus, dt_limit, segments, walks: Walks = ONE_WALK):
    """d [k*b l h] in float32, 0 on padding, of k walks with dt_bias [k h]; of one walk that may be [h]."""
    biases = [None] * walks.number if dt_bias is None else dt_bias.reshape(walks.number, -1)
    steps = [discretize(dt, bias, dt_softplus, dt_limit, jnp.float32) for bias in biases]
    steps = steps[0] if walks.number == 1 else jnp.concatenate(steps)
    return steps if segments is None else jnp.where(segments.real[..., None], steps, 0)


def _rates(A, steps):
    """A [h] or [k h] for each of the rows of d [k*b l h], in float32."""
    A = A.astype(jnp.float32).reshape(-1, A.shape[-1])
    return jnp.repeat(A, steps.shape[0] // A.shape[0], axis=0)


def by_chunk(a, chunks: int):
    """[b l h] -> [b h chunks 64], zeros behind the end."""
    a = jnp.pad(a, ((0, 0), (0, chunks * CHUNK - a.shape[1]), (0, 0)))
    return jnp.swapaxes(a, 1, 2).reshape(a.shape[0], a.shape[2], chunks, CHUNK)


# The kernel.


def cumulated(d, rates, names: tuple[str, ...], walks: Walks):
    """The exponents called `names` for the step sizes d [b h chunks 64] and A of each row [b h]: [b h chunks names 64].

    s and u are those above; to_end_j = s_63 - s_j, written_j = s_63 - u_j; d is a copy. Summed before A scales it.
    """
    scale = jnp.broadcast_to(rates[..., None] * math.log2(math.e), d.shape[:3])
    inputs = {"d": d, "scale": scale}
    return over_chunks(functools.partial(_cumulate, names), inputs, (len(names), CHUNK), "ssd_exponents", walks)


def _cumulate(names, refs, out_ref, tile, backwards, ones):
    d = load(refs["d"].at[tile], MATRIX, device_memory=True)
    row, column = positions()
    ones[...] = jnp.where(row <= column, 1.0, 0.0).astype(ones.dtype)
    s = product_with_ones(d, ones, backwards) * rows(load(refs["scale"].at[tile], ROWS, device_memory=True))
    u = s - jnp.log2(d)
    last = rows(jnp.sum(jnp.where(column == choose(backwards, 0, CHUNK - 1), s, 0.0), axis=1))
    values = {"s": s, "u": u, "to_end": last - s, "written": last - u, "d": d}
    for i, name in enumerate(names):
        out_ref.at[tile, i][...] = values[name]
