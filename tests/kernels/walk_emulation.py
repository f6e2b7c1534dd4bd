"""What the forward kernels of the Mosaic GPU backend compute, in plain JAX: for where there is no GPU.

They stand in for `exponents.cumulated`, `forward.walk` and `forward.states_of_parts`, read what those read (the prepared
exponents, the integers of packed sequences, the parts of a split sequence) and round where they round, so all that
surrounds the kernels can be tested on a CPU. Walks from the end are emulated on flipped arrays.
"""

import functools
import math

import jax.numpy as jnp

from pallas_kernels.ssd.pallas_gpu.tiles import CHUNK
from pallas_kernels.ssd.visibility import start_of_sequence


def flipped(a, backwards, *axes):
    """`a` [k*b ..] with the rows of walks from the end flipped on `axes`; backwards [k*b]."""
    return jnp.where(backwards.reshape(-1, *(1,) * (a.ndim - 1)), jnp.flip(a, axes), a)


def backwards_of(rows, walks):
    return jnp.arange(rows) >= rows // walks.number * walks.forwards


def repeated(a, rows):
    """What walks share, for each of them."""
    return jnp.tile(a, (rows // a.shape[0], *(1,) * (a.ndim - 1)))


def cumulated(d, rates, names, walks):
    backwards = backwards_of(d.shape[0], walks)
    return flipped(_cumulated(flipped(d, backwards, 3), rates, names), backwards, 4)


def _cumulated(d, rates, names):
    s = jnp.cumsum(d, axis=3) * (rates * math.log2(math.e))[..., None, None]
    u, last = s - jnp.log2(d), s[..., -1:]
    values = {"s": s, "u": u, "to_end": last - s, "written": last - u, "d": d}
    return jnp.stack([values[name] for name in names], axis=3)


def _rounded(a, dtype):
    return a.astype(dtype).astype(jnp.float32)


def _chunked(a, chunks, slices):
    """[b l k w] -> [chunk b slices 64 w] in float32, zeros behind the end, as the copies of the kernel fill it."""
    a = a[:, : chunks * CHUNK]
    a = jnp.pad(a, ((0, 0), (0, chunks * CHUNK - a.shape[1]), (0, 0), (0, 0))).astype(jnp.float32)
    a = jnp.repeat(a, slices // a.shape[2], axis=2).reshape(a.shape[0], chunks, CHUNK, slices, -1)
    return jnp.transpose(a, (1, 0, 3, 2, 4))


def _by_chunk_and_slice(factors, slices):
    return jnp.moveaxis(jnp.repeat(factors, slices // factors.shape[1], axis=1), 2, 0)  # [chunk b slices 2 64]


def _left_at_end(s, u, first_visible):
    """How much is left at a chunk's end of the state that enters it, and of what each token writes."""
    kept, to_end = jnp.exp2(s[..., -1]), jnp.exp2(s[..., -1:] - u)
    if first_visible is not None:
        start = start_of_sequence(first_visible[:, -1])
        to_end = jnp.where((jnp.arange(CHUNK)[None] >= start[:, None])[:, None], to_end, 0)
        kept = jnp.where((start < 0)[:, None], kept, 0)
    return kept, to_end


def in_time(a, tokens, backwards):
    """[k*b l ..] as walks meet the tokens of all chunks, zeros behind the end of the sequence."""
    a = jnp.pad(a[:, :tokens], ((0, 0), (0, max(0, tokens - a.shape[1])), *((0, 0),) * (a.ndim - 2)))
    return flipped(a, backwards, 1)


def of_walks(kernel):
    """`kernel(plan=, x=, B=, factors=, ...)` for one walk -> the same for several, all rows in the order of their walk."""

    @functools.wraps(kernel)
    def run(*, plan, x, B, factors, walks, C=None, D=None, **arguments):
        if walks.number == 1 and walks.forwards == 1:
            read = {} if C is None else {"C": C, "D": D}
            return kernel(plan=plan, x=x, B=B, factors=factors, **read, **arguments)
        rows, length = factors.shape[0], x.shape[1]
        backwards = backwards_of(rows, walks)

        def walked(a):
            return in_time(repeated(a, rows), plan.chunks * CHUNK, backwards)

        read = {} if C is None else {"C": walked(C), "D": None if D is None else rows_of_skip(D, walks, rows)}
        factors = flipped(factors, backwards, 2, 4)
        results = kernel(plan=plan, x=walked(x), B=walked(B), factors=factors, **read, **arguments)
        if C is None:
            return results
        return flipped(results[0], backwards, 1)[:, :length], results[1]

    return run


def rows_of_skip(D, walks, rows):
    """[k*slices ..] -> [k*b slices 64], which differs between rows"""
    D = D.reshape(walks.number, -1, *D.shape[1:])
    D = jnp.broadcast_to(D[..., None], (*D.shape, CHUNK)) if D.ndim == 2 else D
    return jnp.repeat(D, rows // walks.number, axis=0)


@of_walks
def states_of_parts(*, plan, x, B, factors, first_visible=None):
    batch, _, slices, _ = x.shape
    dtype = x.dtype
    x, B = (_chunked(a, plan.chunks, slices) for a in (x, B))
    factors = _by_chunk_and_slice(factors, slices)
    added, kept = [], []
    for part in range(plan.parts - 1):
        state, later = jnp.zeros((batch, slices, CHUNK, B.shape[-1])), jnp.ones((batch, slices))
        for chunk in reversed(range(part * plan.chunks_per_part, (part + 1) * plan.chunks_per_part)):
            first = None if first_visible is None else first_visible[:, chunk]
            chunk_kept, to_end = _left_at_end(factors[chunk, :, :, 0], factors[chunk, :, :, 1], first)
            written = _rounded(x[chunk] * (later[..., None] * to_end)[..., None], dtype)
            state += jnp.einsum("bsjp,bsjn->bspn", written, B[chunk])
            later *= chunk_kept
        added.append(state)
        kept.append(jnp.repeat(later[..., None], CHUNK, axis=2))
    return jnp.stack(added, axis=1), jnp.stack(kept, axis=1)


@of_walks
def walk(
    *,
    plan,
    x,
    B,
    factors,
    C,
    D=None,
    z=None,
    state=None,
    added=None,
    kept=None,
    first_visible=None,
    keep_state=False,
):
    batch, length, slices, _ = x.shape
    n, dtype = B.shape[-1], x.dtype
    tokens = plan.chunks * CHUNK

    def chunked(a):
        return _chunked(a, plan.chunks, slices)

    def rounded(a):
        return _rounded(a, dtype)

    x_chunks, z_chunks, B = chunked(x), None if z is None else chunked(z), chunked(B)
    factors = _by_chunk_and_slice(factors, slices)
    C, ys = chunked(C), []
    for part in range(plan.parts):
        carried = jnp.zeros((batch, slices, CHUNK, n), jnp.float32) if state is None else state
        for earlier in range(part):
            carried = kept[:, earlier, :, :, None] * carried + added[:, earlier]
        for chunk in range(part * plan.chunks_per_part, (part + 1) * plan.chunks_per_part):
            x_c, B_c, s, u = x_chunks[chunk], B[chunk], factors[chunk, :, :, 0], factors[chunk, :, :, 1]
            position = jnp.arange(CHUNK)
            visible = position[:, None] >= position[None, :]
            visible, enters, real = visible[None, None], jnp.array(True), jnp.array(True)
            first = None if first_visible is None else first_visible[:, chunk]
            chunk_kept, to_end = _left_at_end(s, u, first)
            if first_visible is not None:
                visible = visible & (position[None, None] >= first[..., None])[:, None]
                enters, real = (first < 0)[:, None, :, None], (first < CHUNK)[:, None, :, None]
            scores = jnp.einsum("bsin,bsjn->bsij", C[chunk], B_c)
            weights = jnp.where(visible, scores * jnp.exp2(s[..., :, None] - u[..., None, :]), 0)
            y = jnp.einsum("bsin,bspn->bsip", C[chunk], rounded(carried)) * jnp.exp2(s)[..., None]
            y = jnp.where(enters, y, 0)
            if D is not None:
                y += (D[:, :, None] if D.ndim == 3 else D.reshape(1, slices, 1, -1)) * x_c
            y += jnp.einsum("bsij,bsjp->bsip", rounded(weights), x_c)
            if z is not None:
                y *= z_chunks[chunk] / (1 + jnp.exp(-z_chunks[chunk]))
            ys.append(jnp.where(real, y, 0).astype(dtype))
            written = rounded(x_c * to_end[..., None])
            carried = chunk_kept[..., None, None] * carried + jnp.einsum("bsjp,bsjn->bspn", written, B_c)
    y = jnp.transpose(jnp.stack(ys), (1, 0, 3, 2, 4)).reshape(batch, tokens, slices, CHUNK)[:, :length]
    return y, carried if keep_state else None
