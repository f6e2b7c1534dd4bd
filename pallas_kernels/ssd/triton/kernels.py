"""The kernels, in Triton: this file alone imports it, so import this file inside functions only.

All arrays are contiguous. x, y, dy [b l h p], B, C [b l g n], states [b chunks h p n]; s, d and the gradients of d and
d A [b h chunks Q]; first_visible [b chunks Q]. Tiles are filled up to powers of two; what lies behind the end of an
axis is read as zeros and not written. Offsets of tiles are int64, offsets in a tile int32.

Arguments in capitals are constants. P, N: width of a head and of its state, BP, BN: of a tile. PACKED: several
sequences share a row. A pointer that a call does not need repeats another.
"""

from typing import no_type_check

import triton
import triton.language as tl

from pallas_kernels.ssd.visibility import PADDING

PADDED = tl.constexpr(PADDING)


@triton.jit
@no_type_check
def tile_of(pointer, row_stride, rows, columns, ROWS, COLUMNS):
    inside = (rows[:, None] < ROWS) & (columns[None, :] < COLUMNS)
    return tl.load(pointer + rows[:, None] * row_stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
@no_type_check
def store_tile(pointer, row_stride, rows, columns, ROWS, COLUMNS, tile):
    inside = (rows[:, None] < ROWS) & (columns[None, :] < COLUMNS)
    tl.store(pointer + rows[:, None] * row_stride + columns[None, :], tile.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
@no_type_check
def decays_of(s_i, s_j, i, j, first_visible, PACKED: tl.constexpr):
    """exp(s_i - s_j) where token i sees token j, else 0: i along one axis, j along the other. first_visible is of i."""
    visible = i >= j
    if PACKED:
        visible &= j >= first_visible
    return tl.exp(tl.where(visible, tl.minimum(s_i - s_j, 0.0), float("-inf")))


@triton.jit
@no_type_check
def start_of_last(first_visible, Q: tl.constexpr):
    """Where in its chunk the sequence starts that the chunk's last token belongs to; negative: before the chunk."""
    last = tl.load(first_visible + Q - 1)
    return tl.where(last < Q, last, last - PADDED)


@triton.jit
@no_type_check
def block_of(block, batch, group, chunk, chunks, heads, groups, HEADS):
    """The number of a program's tile in [blocks b g chunks], for the block-th HEADS heads of all."""
    of_group = block % (heads // groups // HEADS)
    return ((of_group * tl.num_programs(2) + batch) * groups + group) * chunks + chunk


@triton.jit
@no_type_check
def ssd_states(
    values,
    keys,
    s,
    d,
    first_visible,
    ends,
    length,
    chunks,
    heads,
    groups,
    states,
    last,
    P: tl.constexpr,
    N: tl.constexpr,
    Q: tl.constexpr,
    BP: tl.constexpr,
    BN: tl.constexpr,
    REVERSE: tl.constexpr,
    HAS_ENDS: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Walks along the chunks with one tile of one head's state, which stays in registers, and leaves it at each.

    Forward with x and B: the state that enters a chunk. In reverse with dy and C: the gradient of the state that
    leaves it. `ends` [b h p n] is the first of them in the order of the walk, `last` what comes after the last.
    """
    tile, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    tiles: tl.constexpr = (N + BN - 1) // BN
    p = tile // tiles * BP + tl.arange(0, BP)
    n = tile % tiles * BN + tl.arange(0, BN)
    q = tl.arange(0, Q)
    group = head // (heads // groups)
    of_head = batch * heads + head
    state = tl.zeros((BP, BN), tl.float32)
    if HAS_ENDS:
        state = tile_of(ends + of_head * P * N, N, p, n, P, N)
    for step in range(chunks):
        chunk = chunks - 1 - step if REVERSE else step
        store_tile(states + ((batch * chunks + chunk) * heads + head) * P * N, N, p, n, P, N, state)
        exponents = s + (of_head * chunks + chunk) * Q
        s_q, s_end = tl.load(exponents + q), tl.load(exponents + Q - 1)
        kept = tl.exp(s_end)
        d_q = tl.load(d + (of_head * chunks + chunk) * Q + q)
        factor = tl.exp(s_q) if REVERSE else tl.exp(tl.minimum(s_end - s_q, 0.0)) * d_q
        if PACKED:
            visible = first_visible + (batch * chunks + chunk) * Q
            start = start_of_last(visible, Q)
            kept = tl.where(start < 0, kept, 0.0)
            passes = tl.load(visible + q) < 0 if REVERSE else q >= start
            factor = tl.where(passes, factor, 0.0)
        token, rest = batch * length + chunk * Q, length - chunk * Q
        value = tile_of(values + (token * heads + head) * P, heads * P, q, p, rest, P)
        key = tile_of(keys + (token * groups + group) * N, groups * N, q, n, rest, N)
        written = (value * factor[:, None]).to(value.dtype)
        state = tl.dot(tl.trans(written), key, state * kept, input_precision=PRECISION)
    store_tile(last + of_head * P * N, N, p, n, P, N, state)


@triton.jit
@no_type_check
def ssd_outputs(
    x,
    B,
    C,
    s,
    d,
    first_visible,
    states,
    D,
    z,
    length,
    chunks,
    heads,
    groups,
    y,
    P: tl.constexpr,
    N: tl.constexpr,
    Q: tl.constexpr,
    BP: tl.constexpr,
    BN: tl.constexpr,
    HEADS: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_Z: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The outputs of one chunk of HEADS heads of one group, from the states that enter the chunk."""
    chunk, first, batch = tl.program_id(0), tl.program_id(1) * HEADS, tl.program_id(2).to(tl.int64)
    p, n, q = tl.arange(0, BP), tl.arange(0, BN), tl.arange(0, Q)
    group = first // (heads // groups)
    token, rest = batch * length + chunk * Q, length - chunk * Q
    B += (token * groups + group) * N
    C += (token * groups + group) * N
    queries = tile_of(C, groups * N, q, n, rest, N)
    scores = tl.zeros((Q, Q), tl.float32)
    for k in range(0, N, BN):
        query, key = tile_of(C + k, groups * N, q, n, rest, N - k), tile_of(B + k, groups * N, q, n, rest, N - k)
        scores = tl.dot(query, tl.trans(key), scores, input_precision=PRECISION)
    visible = q
    if PACKED:
        visible = tl.load(first_visible + (batch * chunks + chunk) * Q + q)
    for head in range(first, first + HEADS):
        of_chunk = ((batch * heads + head) * chunks + chunk) * Q
        s_q, d_q = tl.load(s + of_chunk + q), tl.load(d + of_chunk + q)
        of_state = states + ((batch * chunks + chunk) * heads + head) * P * N
        value = tile_of(x + (token * heads + head) * P, heads * P, q, p, rest, P)
        from_state = tl.exp(s_q)
        if PACKED:
            from_state = tl.where(visible < 0, from_state, 0.0)
        decays = decays_of(s_q[:, None], s_q[None, :], q[:, None], q[None, :], visible[:, None], PACKED)
        weights = (scores * decays * d_q[None, :]).to(value.dtype)
        result = tl.zeros((Q, BP), tl.float32)
        for k in range(0, N, BN):
            query = queries if BN >= N else tile_of(C + k, groups * N, q, n, rest, N - k)
            state = tile_of(of_state + k, N, p, n, P, N - k)
            result = tl.dot(query, tl.trans(state), result, input_precision=PRECISION)
        result = tl.dot(weights, value, result * from_state[:, None], input_precision=PRECISION)
        if HAS_D:
            result += value * tl.load(D + head * P + p, mask=p < P, other=0.0)[None, :]
        if HAS_Z:
            gate = tile_of(z + (token * heads + head) * P, heads * P, q, p, rest, P).to(tl.float32)
            result *= gate / (1.0 + tl.exp(-gate))
        if PACKED:
            result = tl.where((visible < Q)[:, None], result, 0.0)
        store_tile(y + (token * heads + head) * P, heads * P, q, p, rest, P, result)


@triton.jit
@no_type_check
def ssd_gradients_through_states(
    values,
    keys,
    s,
    d,
    first_visible,
    states,
    dstates,
    length,
    chunks,
    heads,
    groups,
    dkeys,
    through,
    at_end,
    P: tl.constexpr,
    N: tl.constexpr,
    Q: tl.constexpr,
    BP: tl.constexpr,
    BN: tl.constexpr,
    HEADS: tl.constexpr,
    READING: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What reading from the states, or writing to them, adds to the gradients of C, or B, in one chunk.

    Reading: values dy, keys C, the states that enter the chunks. Writing: x, B, the gradients of those that leave them.
    dkeys [blocks b g chunks Q n] is the sum over HEADS heads of one group; through [b h chunks Q] how much each token
    reads or writes, weighted by gradients; at_end [b h chunks] the same for what is left of the state that enters.
    """
    chunk, block, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    first = block * HEADS
    p, n, q = tl.arange(0, BP), tl.arange(0, BN), tl.arange(0, Q)
    group = first // (heads // groups)
    token, rest = batch * length + chunk * Q, length - chunk * Q
    key = tile_of(keys + (token * groups + group) * N, groups * N, q, n, rest, N)
    dkey = tl.zeros((Q, BN), tl.float32)
    for head in range(first, first + HEADS):
        one = (batch * heads + head) * chunks + chunk
        of_state = ((batch * chunks + chunk) * heads + head) * P * N
        value = tile_of(values + (token * heads + head) * P, heads * P, q, p, rest, P)
        state = tile_of(states + of_state, N, p, n, P, N)
        s_q, s_end = tl.load(s + one * Q + q), tl.load(s + one * Q + Q - 1)
        if READING:
            factor, kept = tl.exp(s_q), tl.exp(s_end)
        else:
            factor = tl.exp(tl.minimum(s_end - s_q, 0.0)) * tl.load(d + one * Q + q)
        if PACKED:
            visible = first_visible + (batch * chunks + chunk) * Q
            start = start_of_last(visible, Q)
            if READING:
                factor, kept = tl.where(tl.load(visible + q) < 0, factor, 0.0), tl.where(start < 0, kept, 0.0)
            else:
                factor = tl.where(q >= start, factor, 0.0)
        product = tl.dot(value, state, input_precision=PRECISION) * factor[:, None]
        dkey += product
        tl.store(through + one * Q + q, tl.sum(product * key, 1))
        if READING:
            dstate = tile_of(dstates + of_state, N, p, n, P, N)
            tl.store(at_end + one, kept * tl.sum(state.to(tl.float32) * dstate))
    store_tile(dkeys + block_of(block, batch, group, chunk, chunks, heads, groups, HEADS) * Q * N, N, q, n, Q, N, dkey)


@triton.jit
@no_type_check
def ssd_gradients(
    x,
    dy,
    B,
    C,
    s,
    d,
    first_visible,
    dstates,
    read,
    written,
    at_end,
    D,
    length,
    chunks,
    heads,
    groups,
    dx,
    dB,
    dC,
    dd,
    da,
    dD,
    P: tl.constexpr,
    N: tl.constexpr,
    Q: tl.constexpr,
    BP: tl.constexpr,
    BN: tl.constexpr,
    HEADS: tl.constexpr,
    HAS_D: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """All other gradients of one chunk of HEADS heads of one group: matrices are [i j], the names those of `backward`.

    dB, dC [blocks b g chunks Q n] hold what comes from inside the chunk; dd and da [b h chunks Q] are the gradients of
    d and d A; dD [b chunks h p] is what the tokens of the chunk contribute. read, written and at_end are what
    `ssd_gradients_through_states` found.
    """
    chunk, block, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    first = block * HEADS
    p, n, q = tl.arange(0, BP), tl.arange(0, BN), tl.arange(0, Q)
    group = first // (heads // groups)
    token, rest = batch * length + chunk * Q, length - chunk * Q
    B += (token * groups + group) * N
    C += (token * groups + group) * N
    keys = tile_of(B, groups * N, q, n, rest, N)
    scores = tl.zeros((Q, Q), tl.float32)
    for k in range(0, N, BN):
        query, key = tile_of(C + k, groups * N, q, n, rest, N - k), tile_of(B + k, groups * N, q, n, rest, N - k)
        scores = tl.dot(query, tl.trans(key), scores, input_precision=PRECISION)
    dscores = tl.zeros((Q, Q), tl.float32)
    visible, start = q, 0
    if PACKED:
        visible = tl.load(first_visible + (batch * chunks + chunk) * Q + q)
        start = start_of_last(first_visible + (batch * chunks + chunk) * Q, Q)
    for head in range(first, first + HEADS):
        one = (batch * heads + head) * chunks + chunk
        s_q, d_q, s_end = tl.load(s + one * Q + q), tl.load(d + one * Q + q), tl.load(s + one * Q + Q - 1)
        value = tile_of(x + (token * heads + head) * P, heads * P, q, p, rest, P)
        dvalue = tile_of(dy + (token * heads + head) * P, heads * P, q, p, rest, P)
        of_state = dstates + ((batch * chunks + chunk) * heads + head) * P * N
        to_end = tl.exp(tl.minimum(s_end - s_q, 0.0))
        if PACKED:
            to_end = tl.where(q >= start, to_end, 0.0)

        decays = decays_of(s_q[:, None], s_q[None, :], q[:, None], q[None, :], visible[:, None], PACKED)
        weights = decays * scores
        r = tl.zeros((Q, BP), tl.float32)
        for k in range(0, N, BN):
            key = keys if BN >= N else tile_of(B + k, groups * N, q, n, rest, N - k)
            dstate = tile_of(of_state + k, N, p, n, P, N - k)
            r = tl.dot(key, tl.trans(dstate), r, input_precision=PRECISION)
        r *= to_end[:, None]
        r = tl.dot(tl.trans(weights.to(value.dtype)), dvalue, r, input_precision=PRECISION)
        tl.store(dd + one * Q + q, tl.sum(value * r, 1))
        r *= d_q[:, None]
        if HAS_D:
            r += dvalue * tl.load(D + head * P + p, mask=p < P, other=0.0)[None, :]
            skipped = tl.sum(value.to(tl.float32) * dvalue, 0)
            tl.store(dD + ((batch * chunks + chunk) * heads + head) * P + p, skipped, mask=p < P)
        store_tile(dx + (token * heads + head) * P, heads * P, q, p, rest, P, r)

        # d_t A is a part of all s_i with i >= t, and of all decays up to the end of the chunk.
        moments = tl.dot(dvalue, tl.trans(value), input_precision=PRECISION) * d_q[None, :]
        dscores += moments * decays
        moments *= weights
        written_q = tl.load(written + one * Q + q)
        ds = tl.sum(moments, 1) - tl.sum(moments, 0) + tl.load(read + one * Q + q) - written_q
        da_q = tl.cumsum(ds, 0, reverse=True) + tl.sum(written_q) + tl.load(at_end + one)
        tl.store(da + one * Q + q, da_q)

    dscores = dscores.to(keys.dtype)
    of_block = block_of(block, batch, group, chunk, chunks, heads, groups, HEADS) * Q * N
    for k in range(0, N, BN):
        query, key = tile_of(C + k, groups * N, q, n, rest, N - k), tile_of(B + k, groups * N, q, n, rest, N - k)
        dkey = tl.dot(tl.trans(dscores), query, input_precision=PRECISION)
        dquery = tl.dot(dscores, key, input_precision=PRECISION)
        store_tile(dB + of_block + k, N, q, n, Q, N - k, dkey)
        store_tile(dC + of_block + k, N, q, n, Q, N - k, dquery)
