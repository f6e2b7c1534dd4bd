"""The gradient of the SSD on Hopper: from the states at the boundaries of the chunks, all chunks at once.

With S the state that enters a chunk, dS the gradient of the one that leaves it, dy that of the outputs, and the
exponents of `exponents.prepare_backward`, for each head (Mamba-2, arXiv 2405.21060, section 6, differentiated):

    E_ij = 2^(s_i - s_j) where i sees j, else 0          G_ij = C_i . B_j          M_ij = dy_i . x_j
    r_j  = sum_i E_ij G_ij dy_i + 2^to_end_j dS B_j
    dx_j = d_j r_j + D dy_j
    dB_j = sum over heads of  d_j (sum_i E_ij M_ij C_i + 2^to_end_j dS^T x_j)
    dC_i = sum over heads of  sum_j E_ij d_j M_ij B_j + 2^from_state_i S^T dy_i

A thread block takes one chunk and some of the heads that share B and C. One warpgroup copies, one stands on the side
of the tokens j that write (dx, dB), one on the side of the tokens i that read (dC), so that every sum runs along rows
of a matrix in registers. dB and dC are added up over the heads in registers, and over thread blocks by XLA in a fixed
order: no atomics, the same bits every time.

The step sizes and decays get their gradients from a few numbers for each token, see `log_decay_gradients`. With W_ij =
E_ij d_j G_ij M_ij, the gradient of s_i is the sum of row i less the sum of column i: numbers that nearly cancel, so
both sides compute W in float32 and from the same exponents.

Several walks over the same tokens (`pallas_kernels.walks`) are further rows of the work. Only who sees whom differs in
a walk from the end, and where a chunk ends.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import PROCESSORS, load
from pallas_kernels.segments import number_segments
from pallas_kernels.ssd.pallas_gpu import exponents, forward
from pallas_kernels.ssd.pallas_gpu.boundaries import boundary_states
from pallas_kernels.ssd.pallas_gpu.chunk_sums import over_chunks, positions, product_with_ones
from pallas_kernels.ssd.pallas_gpu.slices import Slices
from pallas_kernels.ssd.pallas_gpu.tiles import (
    CHUNK,
    COLUMNS,
    COMPILER_PARAMS,
    MATRIX,
    ROWS,
    columns,
    keep_filled,
    operand,
    rows,
    square,
    times,
    zeros,
)
from pallas_kernels.walks import ONE_WALK, Walks, choose, shared

STAGES = 3
WIDEST_STATE = 128  # dB and dC of a wider one do not fit into registers

# What the kernel tells about each token of each head, and about each channel: rows of its output `sums`.
X_R, COLUMN, X_STATE, X_DY, ROW, STATES = range(6)


def gradients(arrays: dict, cotangents, *, dt_softplus, dt_limit, return_final_state, walks=ONE_WALK) -> dict:
    """The gradient of every array of `arrays`, the arguments of `forward.outputs` by name, for those of its outputs.

    Of k walks dy may have k*b rows, or b rows that all walks share. Gradients of x, B and C are those of each walk: they
    have k*b rows, and those of B and C are float32.
    """
    dy, dfinal = cotangents if return_final_state else (cotangents, None)
    x, dt, A, B, C = (arrays[name] for name in ("x", "dt", "A", "B", "C"))
    D, z, dt_bias, initial_state, segment_ids = (
        arrays.get(name) for name in ("D", "z", "dt_bias", "initial_state", "segment_ids")
    )
    result = {}
    segments = None if segment_ids is None else number_segments(segment_ids)
    if segments is not None:
        dy = jnp.where(segments.real[..., None, None], dy, 0)
    if z is not None:
        without_gate = {name: a for name, a in arrays.items() if name != "z"}
        y = forward.outputs(**without_gate, dt_softplus=dt_softplus, dt_limit=dt_limit)
        gate, pullback = jax.vjp(jax.nn.silu, z.astype(jnp.float32))
        (dz,) = pullback(dy * y.astype(jnp.float32))
        result["z"] = dz.astype(z.dtype)
        dy = (dy * gate).astype(x.dtype)

    length, heads, head_dim = x.shape[1:]
    state_size = B.shape[-1]
    slices = Slices(heads, head_dim, state_size)
    chunks = -(-length // CHUNK)

    def steps_of(dt, A, dt_bias):
        steps = exponents.step_sizes(dt, dt_bias, dt_softplus, dt_limit, segments, walks)
        by_walk = steps.reshape(walks.number, -1, heads)
        return steps, (by_walk * A.astype(jnp.float32).reshape(walks.number, 1, heads)).reshape(steps.shape)

    (steps, _), steps_pullback = jax.vjp(steps_of, dt, A, dt_bias)
    batch = steps.shape[0]  # with those of all walks
    factors, first_visible = exponents.prepare_backward(steps, A, segments, chunks, walks)
    read = {
        "x": slices.values(x),
        "dy": slices.values(dy),
        "B": slices.keys(B),
        "C": slices.keys(C),
        "factors": factors,
    }
    ends = None
    if initial_state is not None or dfinal is not None:
        none = jnp.zeros((batch, heads, head_dim, state_size))
        ends = jnp.stack([slices.states(none if a is None else a) for a in (initial_state, dfinal)])
    states, entered = boundary_states(**read, ends=ends, walks=walks)
    skip = None if D is None else slices.skip(D)
    dx, dB, dC, sums = chunk_gradients(**read, states=states, D=skip, first_visible=first_visible, walks=walks)
    sums = sums.reshape(batch, heads, slices.per_head, chunks, 6, CHUNK).sum(axis=2)
    result["x"] = slices.without_filling(dx)
    for name, like, a in (("B", B, dB), ("C", C, dC)):
        result[name] = a[:, :length, :, :state_size].astype(like.dtype if walks.number == 1 else a.dtype)

    # dt, A and dt_bias through the step sizes and the decays.
    def by_token(a):
        """[b h chunks 64] -> [b l h]"""
        return jnp.swapaxes(a.reshape(batch, heads, -1), 1, 2)[:, :length]

    dsteps, dlog_decays = by_token(sums[..., X_R, :]), by_token(log_decay_gradients(sums, factors, walks))
    result["dt"], result["A"], dbias = steps_pullback((dsteps, dlog_decays))
    if dt_bias is not None:
        result["dt_bias"] = dbias
    if D is not None:
        if D.ndim == 1:
            dD = sums[..., X_DY, :].reshape(walks.number, -1, heads, chunks * CHUNK).sum((1, 3))
        else:
            x, dy = (a.reshape(-1, dt.shape[0], *a.shape[1:]).astype(jnp.float32) for a in (x, dy))
            dD = jnp.broadcast_to(jnp.sum(x * dy, axis=(1, 2)), (walks.number, heads, head_dim))
        result["D"] = dD.reshape(D.shape).astype(D.dtype)
    if initial_state is not None:
        result["initial_state"] = slices.states_without_filling(entered).astype(initial_state.dtype)
    if segment_ids is not None:
        result["segment_ids"] = jnp.zeros(segment_ids.shape, jax.dtypes.float0)
    return result


# The kernels.


def log_decay_gradients(sums, factors, walks):
    """The gradient of d A [b h chunks 64], from the sums of `chunk_gradients` and the factors it read."""
    return over_chunks(_log_decay_gradients, {"sums": sums, "factors": factors}, (CHUNK,), "ssd_log_decays", walks)


def _log_decay_gradients(refs, out_ref, tile, backwards, ones):
    def of_sums(row):
        return load(refs["sums"].at[tile, row], MATRIX, device_memory=True)

    def of_factors(row):
        return load(refs["factors"].at[tile, row], MATRIX, device_memory=True)

    row, column = positions()
    ones[...] = jnp.where(row >= column, 1.0, 0.0).astype(ones.dtype)  # d_t A is a part of all s_i with i >= t
    d = of_factors(exponents.STEP)
    through_end = d * of_sums(X_STATE)  # through what is left of a token at the end of its chunk
    later = product_with_ones(of_sums(ROW) - d * of_sums(COLUMN) - through_end, ones, backwards)
    from_state = jnp.exp2(of_factors(exponents.FROM_STATE))
    kept = jnp.sum(jnp.where(column == choose(backwards, 0, CHUNK - 1), from_state, 0.0), axis=1)
    last = jnp.sum(through_end, axis=1) + kept * jnp.sum(of_sums(STATES), axis=1)
    out_ref.at[tile][...] = later + rows(last)


def chunk_gradients(*, x, dy, B, C, factors, states, D=None, first_visible=None, walks=ONE_WALK):
    """(dx [b l slices 64], dB, dC [b l' g n] float32, sums [b slices chunks 6 64]) with l' the length of all chunks.

    x, dy [b l slices 64], B, C [b l g n], factors [b h chunks 5 64] and first_visible [b chunks 64] of
    `prepare_backward`, states [2 b chunks slices 64 n] of `boundary_states`, D [slices] or [slices 64]. Of k walks
    factors, states and results have k*b rows, x, dy, B and C b or k*b, and D has k*slices.
    """
    slices = x.shape[2]
    groups, n = B.shape[2:]
    batch, heads, chunks = factors.shape[:3]
    together = choose_heads(batch * chunks, slices, groups)
    block = Block(together, slices, groups, slices // heads, n, x.dtype, batch, walks)
    inputs = {"x": x, "dy": dy, "B": B, "C": C, "factors": factors, "states": states}
    inputs |= {name: a for name, a in {"D": D, "first_visible": first_visible}.items() if a is not None}
    blocks = slices // block.heads
    dtype = x.dtype
    scratch = {
        "B": operand(dtype, CHUNK, n),
        "C": operand(dtype, CHUNK, n),
        "x": square(dtype, STAGES),
        "dy": square(dtype, STAGES),
        "S": operand(dtype, STAGES, CHUNK, n),
        "dS": operand(dtype, STAGES, CHUNK, n),
        "factors": plgpu.SMEM((STAGES, factors.shape[3], CHUNK), jnp.float32),
        "dx": square(dtype),
        "once": plgpu.Barrier(num_arrivals=2 + ("first_visible" in inputs)),
        "filled": plgpu.Barrier(num_arrivals=5, num_barriers=STAGES),
        "consumed": plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
    }
    if "first_visible" in inputs:
        scratch["first_visible"] = plgpu.SMEM((CHUNK,), jnp.int32)
    of_block = jax.ShapeDtypeStruct((blocks // groups, batch, groups, chunks * CHUNK, n), jnp.float32)
    dx, dB, dC, sums = plgpu.kernel(
        functools.partial(_body, block, [*inputs]),
        out_type=(
            jax.ShapeDtypeStruct((batch, *x.shape[1:]), dtype),
            of_block,
            of_block,
            jax.ShapeDtypeStruct((batch, slices, chunks, 6, CHUNK), jnp.float32),
        ),
        scratch_types=scratch,
        grid=(batch, chunks, blocks),
        grid_names=("batch", "chunk", "block"),
        num_threads=3,
        thread_name="warpgroup",
        kernel_name="ssd_gradients",
        # The one buffer that warps write and others read, dx, waits for its copy and for all warps before the next head.
        compiler_params=COMPILER_PARAMS,
    )(*inputs.values())
    dB, dC = (jnp.swapaxes(a.sum(axis=0), 1, 2) for a in (dB, dC))
    return dx, dB, dC, sums


def choose_heads(places: int, slices: int, groups: int) -> int:
    """How many slices of a group one thread block takes, for `places` chunks: the shortest estimated time."""
    per_group = slices // groups

    def microseconds(heads):
        """Seen on an H100: 5 to start a block and to end it, 2.6 for a head; sums of blocks pass through memory."""
        rounds = -(-places * slices // heads // PROCESSORS)
        return rounds * (5 + 2.6 * heads) + 0.05 * places * per_group / heads

    return min((heads for heads in range(1, per_group + 1) if per_group % heads == 0), key=microseconds)


@dataclasses.dataclass(frozen=True)
class Block:
    """What a thread block does: `heads` slices of one chunk."""

    heads: int
    slices: int
    groups: int
    slices_per_head: int
    n: int
    dtype: jnp.dtype
    rows: int
    walks: Walks

    @property
    def backwards(self):
        """Whether the walk of this block goes from the end."""
        return self.walks.backwards(lax.axis_index("batch"), self.rows)


def _body(block, input_names, *refs, **buffers):
    refs = dict(zip([*input_names, "dx", "dB", "dC", "sums"], refs, strict=True))
    for name in ("x", "dy", "dx"):
        buffers[name], buffers[f"{name} flat"] = buffers[name]
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup == 0)
    def _():
        plgpu.set_max_registers(240, action="increase")
        _writing_side(block, refs, buffers)

    @pl.when(warpgroup == 1)
    def _():
        plgpu.set_max_registers(240, action="increase")
        _reading_side(block, refs, buffers)

    @pl.when(warpgroup == 2)
    def _():
        plgpu.set_max_registers(24, action="decrease")
        _copy(block, refs, buffers)


def _place(block):
    """(batch, chunk, group, first slice of the block)"""
    first = lax.axis_index("block") * block.heads
    group = lax.div(first, block.slices // block.groups)
    return lax.axis_index("batch"), lax.axis_index("chunk"), group, first


def _copy(block, refs, buffers):
    """Fetches B and C once, and keeps the ring of heads filled."""
    batch, chunk, group, first = _place(block)
    tokens = pl.ds(chunk * CHUNK, CHUNK)

    for name in ("B", "C"):
        source = refs[name].at[shared(refs[name], batch), tokens, group]
        plgpu.copy_gmem_to_smem(source, buffers[name], buffers["once"])
    if "first_visible" in refs:
        plgpu.copy_gmem_to_smem(refs["first_visible"].at[batch, chunk], buffers["first_visible"], buffers["once"])

    def fetch(step, slot):
        one = first + step
        sources = {
            "x flat": refs["x"].at[shared(refs["x"], batch), tokens, one],
            "dy flat": refs["dy"].at[shared(refs["dy"], batch), tokens, one],
            "S": refs["states"].at[0, batch, chunk, one],
            "dS": refs["states"].at[1, batch, chunk, one],
            "factors": refs["factors"].at[batch, lax.div(one, block.slices_per_head), chunk],
        }
        for name, source in sources.items():
            plgpu.copy_gmem_to_smem(source, buffers[name].at[slot], buffers["filled"].at[slot])

    keep_filled(fetch, block.heads, STAGES, buffers["consumed"])


def _writing_side(block, refs, buffers):
    """dx, dB and the sums that belong to the tokens j: rows of matrices [j i], [j p] and [j n]."""
    batch, chunk, _, first = _place(block)
    dtype = block.dtype
    tokens = pl.ds(chunk * CHUNK, CHUNK)
    position_j, position_i = times(ROWS, block.backwards), times(COLUMNS, block.backwards)
    plgpu.barrier_wait(buffers["once"])
    scores = _product(buffers["B"], buffers["C"].transpose((1, 0)), CHUNK)

    def step(step, carry):
        dB, dscores = carry
        slot, one = lax.rem(step, STAGES), first + step
        plgpu.barrier_wait(buffers["filled"].at[slot])
        x_tile, dy_tile, dS_tile = (buffers[name].at[slot] for name in ("x", "dy", "dS"))
        factors, sums = buffers["factors"].at[slot], refs["sums"].at[batch, one, chunk]
        s, first_visible = factors.at[exponents.S], buffers.get("first_visible")

        def products(accumulators):
            moments_acc, r_acc, dB_acc, dscores = accumulators
            plgpu.wgmma(moments_acc, x_tile, dy_tile.transpose((1, 0)))
            plgpu.wgmma(r_acc, buffers["B"], dS_tile.transpose((1, 0)))
            x = load(x_tile, MATRIX).astype(jnp.float32)
            written = (x * rows(jnp.exp2(load(factors.at[exponents.WRITTEN], ROWS)))).astype(dtype)
            plgpu.wgmma(dB_acc, written, dS_tile)

            i, j = columns(position_i), rows(lax.optimization_barrier(position_j))  # see `forward`
            decays = _decays(s, first_visible, i, j, _over_columns, _over_rows)
            weights = (decays * scores).astype(dtype)
            decayed = decays * plgpu.wgmma_accumulator_load(moments_acc, wait_n=2)
            d = load(factors.at[exponents.STEP], ROWS)
            sums.at[COLUMN][...] = jnp.sum(decayed * scores, axis=1)
            dscores[...] += decayed * rows(d)

            r = plgpu.wgmma_accumulator_load(r_acc, wait_n=1) * rows(jnp.exp2(load(factors.at[exponents.TO_END], ROWS)))
            x = load(x_tile, MATRIX).astype(jnp.float32)
            sums.at[X_STATE][...] = jnp.sum(x * r, axis=1)
            r_acc[...] = r
            plgpu.wgmma(r_acc, weights, dy_tile)
            r = plgpu.wgmma_accumulator_load(r_acc, wait_n=0)

            x = load(x_tile, MATRIX).astype(jnp.float32)
            sums.at[X_R][...] = jnp.sum(x * r, axis=1)
            dx = r * rows(d)
            if "D" in refs:
                dy = load(dy_tile, MATRIX).astype(jnp.float32)
                sums.at[X_DY][...] = jnp.sum(x * dy, axis=1)
                per_head = len(refs["D"].shape) == 1
                own = block.walks.of(batch, block.rows) * block.slices + one
                skip = refs["D"][own] if per_head else columns(load(refs["D"].at[own], COLUMNS, device_memory=True))
                dx = dx + skip * dy
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the previous head's dx
            buffers["dx"][...] = dx.astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(buffers["dx flat"], refs["dx"].at[batch, tokens, one])

        square_of_zeros = zeros(CHUNK, CHUNK)
        accumulators = (*map(plgpu.ACC.init, (square_of_zeros, square_of_zeros, dB)), dscores)
        *_, dB, dscores = pl.run_state(products)(accumulators)
        plgpu.barrier_arrive(buffers["consumed"].at[slot])
        return dB, dscores

    dB, dscores = lax.fori_loop(0, block.heads, step, (zeros(CHUNK, block.n), zeros(CHUNK, CHUNK)))
    _finish(block, refs["dB"], dB, dscores, buffers["C"])
    plgpu.wait_smem_to_gmem(0)


def _reading_side(block, refs, buffers):
    """dC and the sums that belong to the tokens i: rows of matrices [i j], [i p] and [i n]."""
    batch, chunk, _, first = _place(block)
    position_i, position_j = times(ROWS, block.backwards), times(COLUMNS, block.backwards)
    plgpu.barrier_wait(buffers["once"])
    scores = _product(buffers["C"], buffers["B"].transpose((1, 0)), CHUNK)

    def step(step, carry):
        dC, dscores = carry
        slot, one = lax.rem(step, STAGES), first + step
        plgpu.barrier_wait(buffers["filled"].at[slot])
        x_tile, dy_tile, S_tile, dS_tile = (buffers[name].at[slot] for name in ("x", "dy", "S", "dS"))
        factors, sums = buffers["factors"].at[slot], refs["sums"].at[batch, one, chunk]
        s, first_visible = factors.at[exponents.S], buffers.get("first_visible")

        def products(accumulators):
            moments_acc, from_state_acc, dC_acc, dscores = accumulators
            plgpu.wgmma(moments_acc, dy_tile, x_tile.transpose((1, 0)))
            plgpu.wgmma(from_state_acc, buffers["C"], S_tile.transpose((1, 0)))
            from_state = rows(jnp.exp2(load(factors.at[exponents.FROM_STATE], ROWS)))
            read = load(dy_tile, MATRIX).astype(jnp.float32) * from_state
            plgpu.wgmma(dC_acc, read.astype(block.dtype), S_tile)

            i, j = rows(lax.optimization_barrier(position_i)), columns(position_j)
            decays = _decays(s, first_visible, i, j, _over_rows, _over_columns)
            decayed = decays * plgpu.wgmma_accumulator_load(moments_acc, wait_n=2)
            decayed = decayed * _over_columns(factors.at[exponents.STEP])
            dscores[...] += decayed
            row = jnp.sum(decayed * scores, axis=1)

            read = load(dy_tile, MATRIX).astype(jnp.float32) * plgpu.wgmma_accumulator_load(from_state_acc, wait_n=1)
            sums.at[ROW][...] = row + jnp.sum(read * from_state, axis=1)
            states = zeros(CHUNK, CHUNK)
            for part in range(0, block.n, CHUNK):
                S, dS = (load(tile.at[:, pl.ds(part, CHUNK)], MATRIX).astype(jnp.float32) for tile in (S_tile, dS_tile))
                states = states + S * dS
            sums.at[STATES][...] = jnp.sum(states, axis=1)

        square_of_zeros = zeros(CHUNK, CHUNK)
        accumulators = (*map(plgpu.ACC.init, (square_of_zeros, square_of_zeros, dC)), dscores)
        *_, dC, dscores = pl.run_state(products)(accumulators)
        plgpu.barrier_arrive(buffers["consumed"].at[slot])
        return dC, dscores

    dC, dscores = lax.fori_loop(0, block.heads, step, (zeros(CHUNK, block.n), zeros(CHUNK, CHUNK)))
    _finish(block, refs["dC"], dC, dscores, buffers["B"])


def _decays(s, first_visible, i, j, over_i, over_j):
    """E, with the tokens i along one axis and the tokens j along the other: their numbers, and how to load along it."""
    decays = jnp.exp2(over_i(s) - over_j(s))
    visible = i >= j
    if first_visible is not None:
        visible &= j >= over_i(first_visible)
    return jnp.where(visible, decays, 0.0)


def _over_rows(ref):
    return rows(load(ref, ROWS))


def _over_columns(ref):
    return columns(load(ref, COLUMNS))


def _product(a, b, width):
    """a @ b as [64 width] in float32."""
    return pl.run_state(lambda acc: plgpu.wgmma(acc, a, b))(plgpu.ACC.init(zeros(CHUNK, width)))


def _finish(block, ref, total, dscores, other):
    """Adds what the scores C_i . B_j contribute, and writes the sum over the heads of this block."""
    batch, chunk, group, _ = _place(block)
    number = lax.rem(lax.axis_index("block"), block.slices // block.groups // block.heads)
    total = pl.run_state(lambda acc: plgpu.wgmma(acc, dscores.astype(block.dtype), other))(plgpu.ACC.init(total))
    ref.at[number, batch, group, pl.ds(chunk * CHUNK, CHUNK)][...] = total
