"""What the backward kernels of the Mosaic GPU backend compute, in plain JAX: for where there is no GPU.

They stand in for `boundaries.boundary_states`, `backward.chunk_gradients` and `backward.log_decay_gradients`, read what
those read and round where they round, so all that surrounds the kernels can be tested on a CPU. What walks share is
repeated first, and walks from the end are emulated on flipped arrays.
"""

import jax.numpy as jnp

from pallas_kernels.ssd.pallas_gpu import backward, exponents
from pallas_kernels.ssd.pallas_gpu.tiles import CHUNK
from pallas_kernels.walks import ONE_WALK
from tests.kernels.walk_emulation import backwards_of, flipped, in_time, repeated, rows_of_skip


def _chunked(a, chunks, slices):
    """[b l k w] -> [b chunks slices 64 w] in float32: zeros behind the end, groups repeated to slices."""
    a = jnp.pad(a[:, : chunks * CHUNK], ((0, 0), (0, max(0, chunks * CHUNK - a.shape[1])), (0, 0), (0, 0)))
    a = a.astype(jnp.float32).reshape(a.shape[0], chunks, CHUNK, *a.shape[2:])
    return jnp.repeat(jnp.swapaxes(a, 2, 3), slices // a.shape[3], axis=2)


def _by_slice(factors, slices):
    """[b h chunks 5 64] -> [b chunks slices 5 64]"""
    return jnp.swapaxes(jnp.repeat(factors, slices // factors.shape[1], axis=1), 1, 2)


def _in_time(factors, walks, **arrays):
    """(the rows that are walked from the end, factors, arrays), all rows in the order of their walk."""
    rows, _, chunks = factors.shape[:3]
    backwards = backwards_of(rows, walks)
    arrays = {name: in_time(repeated(a, rows), chunks * CHUNK, backwards) for name, a in arrays.items()}
    return backwards, flipped(factors, backwards, 2, 4), arrays


def boundary_states(*, x, dy, B, C, factors, ends=None, walks=ONE_WALK):
    backwards, factors, arrays = _in_time(factors, walks, x=x, dy=dy, B=B, C=C)
    (S, dS), entered = _boundary_states(**arrays, factors=factors, ends=ends)
    return jnp.stack([flipped(a, backwards, 1) for a in (S, dS)]), entered


def _boundary_states(*, x, dy, B, C, factors, ends):
    batch, _, slices, _ = x.shape
    chunks, n, dtype = factors.shape[2], B.shape[-1], x.dtype
    f = _by_slice(factors, slices)
    kept = jnp.exp2(f[..., exponents.FROM_STATE, -1])[..., None, None]
    states = []
    for direction, values, keys, row in ((0, x, B, exponents.WRITTEN), (1, dy, C, exponents.FROM_STATE)):
        written = _chunked(values, chunks, slices) * jnp.exp2(f[..., row, :])[..., None]
        added = jnp.einsum(
            "bcsjp,bcsjn->bcspn", written.astype(dtype).astype(jnp.float32), _chunked(keys, chunks, slices)
        )
        state = jnp.zeros((batch, slices, CHUNK, n)) if ends is None else ends[direction]
        seen = []
        for chunk in range(chunks)[:: -1 if direction else 1]:
            seen.append(state.astype(dtype))
            state = kept[:, chunk] * state + added[:, chunk]
        states.append(jnp.stack(seen[:: -1 if direction else 1], axis=1))
    return jnp.stack(states), state


def chunk_gradients(*, x, dy, B, C, factors, states, D=None, first_visible=None, walks=ONE_WALK):
    length = x.shape[1]
    backwards, factors, arrays = _in_time(factors, walks, x=x, dy=dy, B=B, C=C)
    if D is not None and walks.number > 1:
        D = rows_of_skip(D, walks, factors.shape[0])
    states = [flipped(a, backwards, 1) for a in states]
    *of_tokens, sums = _chunk_gradients(**arrays, factors=factors, states=states, D=D, first_visible=first_visible)
    dx, dB, dC = (flipped(a, backwards, 1) for a in of_tokens)
    return dx[:, :length], dB, dC, flipped(sums, backwards, 2, 4)


def _chunk_gradients(*, x, dy, B, C, factors, states, D, first_visible):
    batch, length, slices, _ = x.shape
    chunks, (groups, n), dtype = factors.shape[2], B.shape[2:], x.dtype
    s, from_state, to_end, written, d = jnp.moveaxis(_by_slice(factors, slices), 3, 0)
    x, dy, B, C = (_chunked(a, chunks, slices) for a in (x, dy, B, C))
    S, dS = (a.astype(jnp.float32) for a in states)

    def rounded(a):
        return a.astype(dtype).astype(jnp.float32)

    def product(equation, *operands):
        return jnp.einsum(equation, *operands, preferred_element_type=jnp.float32)

    position = jnp.arange(CHUNK)
    visible = (position[:, None] >= position[None])[None, None, None]  # [i j]
    if first_visible is not None:
        visible &= (position[None, None, None] >= first_visible[..., None])[:, :, None]
    scores, moments = product("bcsin,bcsjn->bcsij", C, B), product("bcsip,bcsjp->bcsij", dy, x)
    E = jnp.where(visible, jnp.exp2(s[..., :, None] - s[..., None, :]), 0)
    E_d = E * d[..., None, :]

    r_state = product("bcsjn,bcspn->bcsjp", B, dS) * jnp.exp2(to_end)[..., None]
    r = r_state + product("bcsij,bcsip->bcsjp", rounded(E * scores), dy)
    dx = r * d[..., None]
    if D is not None:
        dx += dy * (D[:, None, :, None] if D.ndim == 3 else D.reshape(1, 1, slices, 1, -1))
    dB = product("bcsjp,bcspn->bcsjn", rounded(x * jnp.exp2(written)[..., None]), dS)
    dC = product("bcsip,bcspn->bcsin", rounded(dy * jnp.exp2(from_state)[..., None]), S)

    def by_group(a):
        return a.reshape(batch, chunks, groups, -1, *a.shape[3:]).sum(axis=3)

    first_of_group = (slice(None), slice(None), slice(None, None, slices // groups))
    dB = by_group(dB) + product("bcgij,bcgin->bcgjn", rounded(by_group(E_d * moments)), C[first_of_group])
    dC = by_group(dC) + product("bcgij,bcgjn->bcgin", rounded(by_group(E_d * moments)), B[first_of_group])
    q = product("bcsin,bcspn->bcsip", C, S) * jnp.exp2(from_state)[..., None]
    sums = [
        (x * r).sum(-1),
        (E * moments * scores).sum(-2),
        (x * r_state).sum(-1),
        (x * dy).sum(-1),
        (E_d * moments * scores).sum(-1) + (dy * q).sum(-1),
        (S * dS).sum(-1),
    ]
    sums = jnp.swapaxes(jnp.stack(sums, axis=3), 1, 2)
    dx = jnp.swapaxes(dx, 2, 3).reshape(batch, -1, slices, CHUNK)[:, :length].astype(dtype)
    dB, dC = (jnp.swapaxes(a, 2, 3).reshape(batch, -1, groups, n) for a in (dB, dC))
    return dx, dB, dC, sums


def log_decay_gradients(sums, factors, walks):
    backwards = backwards_of(factors.shape[0], walks)
    sums, factors = (flipped(a, backwards, 4) for a in (sums, factors))
    return flipped(_log_decay_gradients(sums, factors), backwards, 3)


def _log_decay_gradients(sums, factors):
    d, kept = factors[..., exponents.STEP, :], jnp.exp2(factors[..., exponents.FROM_STATE, -1])
    through_end = d * sums[..., backward.X_STATE, :]
    ds = sums[..., backward.ROW, :] - d * sums[..., backward.COLUMN, :] - through_end
    last = through_end.sum(-1) + kept * sums[..., backward.STATES, :].sum(-1)
    return jnp.flip(jnp.cumsum(jnp.flip(ds, -1), axis=-1), -1) + last[..., None]
