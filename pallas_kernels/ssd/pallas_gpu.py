"""SSD on Hopper: one fused walk over the chunks of a sequence, the state kept on chip (Pallas, Mosaic GPU).

The mathematics are those of `xla`: inside a chunk of 64 tokens a masked matrix product, from chunk to chunk only the
state. A thread block walks the chunks of `heads` heads that share B and C. One warpgroup copies the next chunks into
shared memory while the others multiply, one head each; a head's state stays in the registers of its warpgroup, so
device memory sees every input and every output once.

XLA prepares what Mosaic GPU cannot do (it has no cumulative sum), as exponents of 2:

    s_i = log2(e) * sum of d_t A up to token i of its chunk
    u_j = s_j - log2(d_j)              so that 2^(s_i - u_j) = exp(sum of d_t A from j+1 to i) d_j, and 0 where d_j is 0

which covers padding and the ragged end (d = 0) without a mask. Differences are never positive where they are used, so
nothing overflows. Packed sequences add one integer for each token, see `_first_visible`.

The tiles are 64 wide. A head of 128 channels is two slices of 64 that decay alike; narrower heads and states are
filled with zeros. When there are too few heads to fill the device, the sequence is split: a first walk computes the
state each part adds, XLA chains these, and the second walk computes all parts at once.
"""

import dataclasses
import functools
import inspect
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.segments import number_segments
from pallas_kernels.ssd.discretize import discretize
from pallas_kernels.ssd.vjp import with_xla_gradient

CHUNK = 64  # tokens; also the width of a slice of a head: the height of one wgmma instruction
SHARED_MEMORY = 227 * 1024  # bytes that one thread block of an H100 or H200 may use
PROCESSORS = 132  # streaming multiprocessors of an H100 or H200

NO_AUTO = True
ROWS = plgpu.Layout.WGMMA.reduce(1)  # a vector that belongs to the rows of a matrix in registers
COLUMNS = plgpu.Layout.WGMMA.reduce(0)


def why_not_here() -> str | None:
    """Why this backend cannot be the automatic choice on the default device."""
    device = jax.devices()[0]
    if device.platform != "gpu":
        return f"needs a CUDA device of compute capability 9.x, the default device is a {device.platform}"
    capability = str(getattr(device, "compute_capability", "unknown"))
    if not capability.startswith("9."):
        return f"needs a CUDA device of compute capability 9.x, {device.device_kind} has {capability}"
    return None


def why_not_ssd(x, dt, A, B, C, *, dt_limit=(0.0, float("inf")), **_) -> str | None:
    head_dim, state_size = x.shape[-1], B.shape[-1]
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        return f"x is {x.dtype}; the kernel multiplies bfloat16 or float16"
    if not x.dtype == B.dtype == C.dtype:
        return f"x, B and C are {x.dtype}, {B.dtype} and {C.dtype}; the kernel multiplies operands of one dtype"
    if head_dim > 64 and head_dim % 64:
        return f"heads are {head_dim} wide; the kernel takes up to 64, or a multiple of 64"
    if state_size > 256:
        return f"the state size is {state_size}; the kernel keeps at most 256 in registers"
    if dt_limit[0] < 0:
        return f"dt_limit starts at {dt_limit[0]}; the kernel takes logarithms of the step sizes"
    return None


def ssd(
    x,
    dt,
    A,
    B,
    C,
    *,
    D=None,
    z=None,
    dt_bias=None,
    dt_softplus=False,
    dt_limit=(0.0, float("inf")),
    initial_state=None,
    segment_ids=None,
    return_final_state=False,
    chunk_size=None,
    precision=None,
):
    del chunk_size, precision  # tiles are 64 tokens, products are exact for 16-bit operands and summed in float32
    arrays = {
        "x": x,
        "dt": dt,
        "A": A,
        "B": B,
        "C": C,
        "D": D,
        "z": z,
        "dt_bias": dt_bias,
        "initial_state": initial_state,
        "segment_ids": segment_ids,
    }
    run = with_xla_gradient(
        _forward, dt_softplus=dt_softplus, dt_limit=dt_limit, return_final_state=return_final_state
    )
    return run({name: a for name, a in arrays.items() if a is not None})


def _forward(
    x,
    dt,
    A,
    B,
    C,
    *,
    D=None,
    z=None,
    dt_bias=None,
    dt_softplus=False,
    dt_limit=(0.0, float("inf")),
    initial_state=None,
    segment_ids=None,
    return_final_state=False,
):
    batch, length, heads, head_dim = x.shape
    groups, state_size = B.shape[2:]
    slices = heads * (-(-head_dim // CHUNK))  # of 64 channels, all heads together
    n = next(width for width in (64, 128, 256) if width >= state_size)
    plan = make_plan(batch, length, slices, groups, n)

    def sliced(a):
        """[b l h p] -> [b l slices 64]"""
        return None if a is None else _filled(a, -1, 64).reshape(batch, length, slices, CHUNK)

    factors, first_visible = prepare(dt, A, dt_bias, dt_softplus, dt_limit, segment_ids, plan.chunks)
    x, z = sliced(x), sliced(z)
    B, C = (_filled(_filled(a, -1, n), 1, 8) for a in (B, C))
    if D is not None:
        D = D.astype(jnp.float32).reshape(heads, -1)
        D = _filled(jnp.broadcast_to(D, (heads, head_dim)), -1, 64).reshape(slices, CHUNK)
    state = None
    if initial_state is not None:
        state = _filled(_filled(initial_state.astype(jnp.float32), 2, 64), 3, n).reshape(batch, 1, slices, CHUNK, n)

    walk = functools.partial(_walk, plan=plan, x=x, B=B, factors=factors, first_visible=first_visible)
    if plan.parts > 1:
        added = walk(parts=plan.parts - 1, keep_states=True)
        kept = jnp.repeat(_kept_by_part(factors, first_visible, plan), slices // heads, axis=2)
        states = [jnp.zeros_like(added[:, 0]) if state is None else state[:, 0]]
        for part in range(plan.parts - 1):
            states.append(kept[:, part, :, None, None] * states[-1] + added[:, part])
        state = jnp.stack(states, axis=1)
    y, final = walk(parts=plan.parts, C=C, D=D, z=z, state=state, keep_states=return_final_state)
    y = y.reshape(batch, length, heads, -1)[..., :head_dim]
    if not return_final_state:
        return y
    return y, final.reshape(batch, heads, -1, n)[:, :, :head_dim, :state_size]


def _filled(a, axis: int, width: int):
    """`a` with zeros behind it on `axis` up to the next multiple of `width`."""
    missing = -a.shape[axis] % width
    if not missing:
        return a
    fill = [(0, 0)] * a.ndim
    fill[axis] = (0, missing)
    return jnp.pad(a, fill)


# What XLA computes beforehand.


def prepare(dt, A, dt_bias, dt_softplus, dt_limit, segment_ids, chunks: int):
    """The exponents s and u [b h chunks 2 64], and for packed sequences `_first_visible` [b chunks 64]."""
    batch, length, heads = dt.shape
    dt = discretize(dt, dt_bias, dt_softplus, dt_limit, jnp.float32)
    first_visible = None
    if segment_ids is not None:
        segments = number_segments(segment_ids)
        dt = jnp.where(segments.real[..., None], dt, 0)
        first_visible = _first_visible(segments, chunks)
    dt = jnp.pad(dt, ((0, 0), (0, chunks * CHUNK - length), (0, 0))).reshape(batch, chunks, CHUNK, heads)
    decay = dt * (A.astype(jnp.float32) * math.log2(math.e))[None, None, None]
    # A cumulative sum; as a matrix product it is one fast kernel, and lands in the layout that the walk reads.
    sums = jnp.tril(jnp.ones((CHUNK, CHUNK), jnp.float32))
    s = jnp.einsum("ij,bcjh->bhci", sums, decay, precision=lax.Precision.HIGHEST)
    u = s - jnp.log2(jnp.transpose(dt, (0, 3, 1, 2)))
    return jnp.stack([s, u], axis=3), first_visible


def _first_visible(segments, chunks: int):
    """For each token the first token of its chunk that it sees, [b chunks 64].

    -1: it sees the state that enters the chunk too. Padding is `_PADDING` more: it sees nothing, but still tells which
    sequence the row is in.
    """
    index = jnp.pad(segments.index, ((0, 0), (0, chunks * CHUNK - segments.index.shape[1])), mode="edge")
    real = jnp.pad(segments.real, ((0, 0), (0, chunks * CHUNK - segments.real.shape[1])))
    starts = jnp.diff(index, axis=1, prepend=0) > 0
    position = jnp.arange(CHUNK, dtype=jnp.int32)[None, None]
    starts = jnp.where(starts.reshape(-1, chunks, CHUNK), position, -1)
    return lax.cummax(starts, axis=2) + jnp.where(real.reshape(starts.shape), 0, _PADDING)


_PADDING = 1024


def _start_of_last(first_visible):
    """Where in its chunk the sequence starts that the chunk's last token belongs to; -1: before the chunk."""
    return jnp.where(first_visible < CHUNK, first_visible, first_visible - _PADDING)


def _kept_by_part(factors, first_visible, plan):
    """How much of the state that enters a part is left at its end, [b parts heads]."""
    batch, heads = factors.shape[:2]
    total = factors[:, :, :, 0, -1].reshape(batch, heads, plan.parts, -1).sum(axis=-1)
    kept = jnp.exp2(jnp.swapaxes(total, 1, 2))
    if first_visible is not None:
        unbroken = _start_of_last(first_visible[:, :, -1]).reshape(batch, plan.parts, -1).max(axis=-1) < 0
        kept = jnp.where(unbroken[..., None], kept, 0)
    return kept


@dataclasses.dataclass(frozen=True)
class Plan:
    """How the work is laid out: `heads` slices for each thread block, the sequence in `parts` of equally many chunks."""

    heads: int
    parts: int
    chunks: int
    """All parts together; the last ones may lie behind the end of the sequence."""

    @property
    def chunks_per_part(self) -> int:
        return self.chunks // self.parts


def make_plan(batch: int, length: int, slices: int, groups: int, n: int) -> Plan:
    """The plan with the shortest estimated time, for slices of 64 channels and a state of n."""
    heads = 2 if n <= 128 and slices // groups % 2 == 0 else 1
    blocks = batch * slices // heads
    chunks = -(-length // CHUNK)

    def microseconds(parts):
        per_part = -(-chunks // parts)
        waves = -(-blocks * parts // PROCESSORS)
        if parts == 1:
            return 1.4 * waves * per_part
        first_waves = -(-blocks * (parts - 1) // PROCESSORS)
        return (1.4 * waves + 0.6 * first_waves) * per_part + 15

    parts = min(range(1, min(chunks, 32) + 1), key=microseconds)
    parts = -(-chunks // -(-chunks // parts))  # no part behind the end
    return Plan(heads, parts, parts * -(-chunks // parts))


# The kernel.


def _walk(*, plan, parts, x, B, factors, first_visible, C=None, D=None, z=None, state=None, keep_states=False):
    """One launch over the first `parts` parts. With C: (y, final state or None), without: the states parts end with.

    x, z [b l slices 64], B, C [b l g n], D [slices 64], state [b parts slices 64 n] that enters each part; a single one
    for all when parts is 1.
    """
    batch, length, slices, _ = x.shape
    groups, n = B.shape[2:]
    dtype, outputs = x.dtype, C is not None
    per_block, per_part = plan.heads, plan.chunks_per_part
    slices_per_head = slices // factors.shape[1]
    stages = _stages(per_block, n, outputs, z is not None, first_visible is not None)
    assert slices % (groups * per_block) == 0

    inputs = {"x": x, "B": B, "C": C, "z": z, "factors": factors, "first_visible": first_visible, "D": D, "state": state}
    inputs = {name: a for name, a in inputs.items() if a is not None}
    out_type = {}
    if outputs:
        out_type["y"] = jax.ShapeDtypeStruct(x.shape, dtype)
    if keep_states:
        kept_parts = 1 if outputs else parts
        out_type["states"] = jax.ShapeDtypeStruct((batch, kept_parts, slices, CHUNK, n), jnp.float32)

    swizzle = plgpu.SwizzleTransform(128)

    def operand(*shape):
        """Shared memory that wgmma reads: tiles of 8 x 64. Copies from and to it need a multiple of 8 tokens."""
        return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, 64)), swizzle))

    def square(*leading):
        """64 x 64 as an `operand`, and without tiles for copies of any number of tokens: the bytes are the same."""
        shape = (*leading, CHUNK, CHUNK)
        return plgpu.RefUnion(operand(*shape), plgpu.SMEM(shape, dtype, transforms=(swizzle,)))

    scratch = {
        "x": square(stages, per_block),
        "B": operand(stages, CHUNK, n),
        "factors": plgpu.SMEM((stages, per_block, 2, CHUNK), jnp.float32),
        "written": operand(per_block, CHUNK, CHUNK),
        "filled": plgpu.Barrier(num_arrivals=_copies(inputs, per_block), num_barriers=stages),
        "consumed": plgpu.Barrier(num_arrivals=per_block, num_barriers=stages),
    }
    if outputs:
        scratch |= {
            "C": operand(stages, CHUNK, n),
            "state": operand(per_block, CHUNK, n),
            "y": square(per_block),
        }
    if z is not None:
        scratch["z"] = square(stages, per_block)
    if first_visible is not None:
        scratch["first_visible"] = plgpu.SMEM((stages, CHUNK), jnp.int32)

    def body(*refs, **buffers):
        names = [*inputs, *(f"out {name}" for name in out_type)]
        for name in ("x", "y", "z"):
            if name in buffers:
                buffers[name], buffers[f"{name} flat"] = buffers[name]
        _body(dict(zip(names, refs, strict=True)), buffers, stages, per_block, per_part, slices_per_head, groups, parts)

    results = plgpu.kernel(
        body,
        out_type=tuple(out_type.values()),
        scratch_types=scratch,
        grid=(slices // per_block, parts, batch),
        grid_names=("block", "part", "batch"),
        num_threads=per_block + 1,
        thread_name="warpgroup",
        kernel_name="ssd_walk" if outputs else "ssd_states",
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            unsafe_no_auto_barriers=NO_AUTO,
            # From 0.11 on the default infers layouts, and finds none for vectors read both as rows and as columns.
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
    )(*inputs.values())
    results = dict(zip(out_type, results, strict=True))
    return (results["y"], results.get("states")) if outputs else results["states"]


def _copies(inputs, per_block: int) -> int:
    """Copies into shared memory for each chunk."""
    shared = sum(name in inputs for name in ("B", "C", "first_visible"))
    return shared + per_block * sum(name in inputs for name in ("x", "z", "factors"))


def _stages(per_block: int, n: int, outputs: bool, gated: bool, packed: bool) -> int:
    """How many chunks fit into shared memory at once, at most 4."""
    tile, wide = CHUNK * CHUNK * 2, CHUNK * n * 2
    fixed = per_block * (tile + outputs * (tile + wide)) + 1024
    stage = (1 + outputs) * wide + per_block * ((1 + gated) * tile + 2 * CHUNK * 4) + packed * CHUNK * 4
    return min(4, (SHARED_MEMORY - fixed) // stage)


def _body(refs, buffers, stages, per_block, per_part, slices_per_head, groups, parts):
    warpgroup = lax.axis_index("warpgroup")
    block, part, batch = lax.axis_index("block"), lax.axis_index("part"), lax.axis_index("batch")
    slices = refs["x"].shape[2]
    group = lax.div(block * per_block, slices // groups)
    first_chunk = part * per_part
    limit_registers = per_block > 1  # with two warpgroups each thread has all it can use

    @pl.when(warpgroup < per_block)
    def _compute():
        if limit_registers:
            plgpu.set_max_registers(232, action="increase")
        _multiply(refs, buffers, stages, per_part, batch, part, first_chunk, warpgroup, block * per_block + warpgroup, parts)

    @pl.when(warpgroup == per_block)
    def _copy():
        if limit_registers:
            plgpu.set_max_registers(40, action="decrease")

        def fetch(chunk, slot):
            tokens = pl.ds((first_chunk + chunk) * CHUNK, CHUNK)
            filled = buffers["filled"].at[slot]
            for name in ("B", "C"):
                if name in refs:
                    plgpu.copy_gmem_to_smem(refs[name].at[batch, tokens, group], buffers[name].at[slot], filled)
            if "first_visible" in refs:
                source = refs["first_visible"].at[batch, first_chunk + chunk]
                plgpu.copy_gmem_to_smem(source, buffers["first_visible"].at[slot], filled)
            for i in range(per_block):
                one = block * per_block + i
                source = refs["factors"].at[batch, lax.div(one, slices_per_head), first_chunk + chunk]
                plgpu.copy_gmem_to_smem(source, buffers["factors"].at[slot, i], filled)
                for name in ("x", "z"):
                    if name in refs:
                        target = buffers[f"{name} flat"].at[slot, i]
                        plgpu.copy_gmem_to_smem(refs[name].at[batch, tokens, one], target, filled)

        for chunk in range(min(stages, per_part)):
            fetch(chunk, chunk)

        @pl.loop(stages, max(per_part, stages))
        def _(chunk):
            slot = lax.rem(chunk, stages)
            plgpu.barrier_wait(buffers["consumed"].at[slot])
            fetch(chunk, slot)


def _multiply(refs, buffers, stages, per_part, batch, part, first_chunk, warpgroup, one, parts):
    """The walk of one warpgroup along the chunks of slice `one`."""
    outputs = "C" in refs
    n = refs["B"].shape[-1]
    dtype = refs["x"].dtype
    square = (CHUNK, CHUNK)

    def rows(vector, shape=square):
        return lax.broadcast_in_dim(vector, shape, [0])

    def columns(vector, shape=square):
        return lax.broadcast_in_dim(vector, shape, [1])

    if "state" in refs:
        state = _load(refs["state"].at[batch, part, one], plgpu.Layout.WGMMA, device_memory=True)
    else:
        state = plgpu.layout_cast(jnp.zeros((CHUNK, n), jnp.float32), plgpu.Layout.WGMMA)
    i, j = (plgpu.broadcasted_iota(jnp.int32, square, axis, layout=plgpu.Layout.WGMMA) for axis in (0, 1))
    skip = columns(_load(refs["D"].at[one], COLUMNS, device_memory=True)) if "D" in refs else None

    def step(chunk, state):
        slot = lax.rem(chunk, stages)
        plgpu.barrier_wait(buffers["filled"].at[slot])
        x_tile, B_tile = buffers["x"].at[slot, warpgroup], buffers["B"].at[slot]
        written_tile = buffers["written"].at[warpgroup]
        factors = buffers["factors"].at[slot, warpgroup]
        last = factors[0, CHUNK - 1]
        kept = jnp.exp2(last)
        if "first_visible" in refs:
            first = buffers["first_visible"].at[slot]
            first_visible = _load(first, ROWS)
            start = _start_of_last(first[CHUNK - 1])
            kept = jnp.where(start < 0, kept, 0.0)

        def store_written():
            x = _load(x_tile, plgpu.Layout.WGMMA)
            written = x.astype(jnp.float32) * rows(jnp.exp2(last - _load(factors.at[1], ROWS)))
            if "first_visible" in refs:
                written = jnp.where(i >= start, written, 0.0)
            written_tile[...] = written.astype(dtype)
            return x

        def add_to(state_acc):
            plgpu.wgmma(state_acc, written_tile.transpose((1, 0)), B_tile)

        def walk_only(state_acc):
            plgpu.commit_smem()  # all warps are done with the previous chunk's tile
            store_written()
            plgpu.commit_smem()
            add_to(state_acc)

        def walk(accumulators):
            """Products are issued as early as their operands exist: the tensor cores work while scores are weighted."""
            scores_acc, y_acc, state_acc = accumulators
            C_tile, state_tile = buffers["C"].at[slot], buffers["state"].at[warpgroup]
            plgpu.wgmma(scores_acc, C_tile, B_tile.transpose((1, 0)))
            x = store_written()
            state_tile[...] = state.astype(dtype)
            plgpu.commit_smem()
            plgpu.wgmma(y_acc, C_tile, state_tile.transpose((1, 0)))
            add_to(state_acc)

            s, u = _load(factors.at[0], ROWS), _load(factors.at[1], COLUMNS)
            visible = i >= j
            if "first_visible" in refs:
                visible &= j >= rows(first_visible)
            decays = jnp.exp2(rows(s) - columns(u))
            scores = plgpu.wgmma_accumulator_load(scores_acc, wait_n=2)
            weights = jnp.where(visible, scores * decays, 0.0).astype(dtype)

            y = plgpu.wgmma_accumulator_load(y_acc, wait_n=1) * rows(jnp.exp2(s))
            if "first_visible" in refs:
                y = jnp.where(rows(first_visible) < 0, y, 0.0)
            if skip is not None:
                y = y + skip * x.astype(jnp.float32)
            y_acc[...] = y
            plgpu.wgmma(y_acc, weights, x_tile)
            y = plgpu.wgmma_accumulator_load(y_acc, wait_n=0)

            if "z" in refs:
                z = _load(buffers["z"].at[slot, warpgroup], plgpu.Layout.WGMMA).astype(jnp.float32)
                y = y * (z / (1.0 + jnp.exp2(z * -math.log2(math.e))))
            if "first_visible" in refs:
                y = jnp.where(rows(first_visible) < CHUNK, y, 0.0)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the previous chunk's
            buffers["y"].at[warpgroup][...] = y.astype(dtype)
            plgpu.commit_smem()
            tokens = pl.ds((first_chunk + chunk) * CHUNK, CHUNK)
            plgpu.copy_smem_to_gmem(buffers["y flat"].at[warpgroup], refs["out y"].at[batch, tokens, one])

        if outputs:
            zeros = plgpu.layout_cast(jnp.zeros(square, jnp.float32), plgpu.Layout.WGMMA)
            accumulators = (plgpu.ACC.init(zeros), plgpu.ACC.init(zeros), plgpu.ACC.init(state * kept))
            _, _, state = pl.run_state(walk)(accumulators)
        else:
            state = pl.run_state(walk_only)(plgpu.ACC.init(state * kept))
        plgpu.barrier_arrive(buffers["consumed"].at[slot])
        return state

    state = lax.fori_loop(0, per_part, step, state)
    if "out states" in refs:
        if outputs:

            @pl.when(part == parts - 1)
            def _():
                refs["out states"].at[batch, 0, one][...] = state
        else:
            refs["out states"].at[batch, part, one][...] = state
    plgpu.wait_smem_to_gmem(0)


# JAX 0.10 takes the index apart from the reference and insists on one.
_EVERYTHING = ((),) if inspect.signature(plgpu.load).parameters["idx"].default is inspect.Parameter.empty else ()


def _load(ref, layout, *, device_memory: bool = False):
    return plgpu.load(ref, *_EVERYTHING, layout=layout, optimized=not device_memory)
