"""SSD on Hopper: one fused walk over the chunks of a sequence, the state kept on chip (Pallas, Mosaic GPU).

The mathematics are those of `xla`: inside a chunk of 64 tokens a masked matrix product, from chunk to chunk only the
state. A thread block walks the chunks of `heads` heads that share B and C. One warpgroup copies the next chunks into
shared memory while the others multiply, one head each; a head's state stays in the registers of its warpgroup, so
device memory sees every input and every output once. The decays arrive as exponents of 2, see `exponents`.

The tiles are 64 wide. A head of 128 channels is two slices of 64 that decay alike; narrower heads and states are
filled with zeros. When there are too few heads to fill the device, the sequence is split: a first launch computes the
state each part adds, and the walk takes all parts at once, each from what the parts before it added.

Of several walks (`pallas_kernels.walks`) a row of the work is one walk over one sequence, with factors and y of its own;
x, B and C may be shared. A walk from the end takes the chunks from the last one back, and in a chunk sees later tokens.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import PROCESSORS, load
from pallas_kernels.ssd.pallas_gpu.exponents import prepare
from pallas_kernels.ssd.pallas_gpu.slices import Slices
from pallas_kernels.ssd.pallas_gpu.tiles import (
    CHUNK,
    COLUMNS,
    COMPILER_PARAMS,
    MATRIX,
    ROWS,
    SHARED_MEMORY,
    columns,
    keep_filled,
    operand,
    rows,
    square,
    times,
    zeros,
)
from pallas_kernels.ssd.visibility import start_of_sequence
from pallas_kernels.walks import ONE_WALK, Walks, choose, mirrored, shared


def outputs(
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
    walks=ONE_WALK,
):
    """Arguments and results as of `ssd`. Of k walks A and dt_bias are [k h], D is [k*h] or [k*h p], x, B and C have b or
    k*b rows, y and the final state k*b; z, packed sequences and states are those of one walk."""
    length, heads, head_dim = x.shape[1:]
    slices = Slices(heads, head_dim, B.shape[3])
    plan = make_plan(dt.shape[0] * walks.number, length, slices.total, B.shape[2], slices.n)
    factors, first_visible = prepare(dt, A, dt_bias, dt_softplus, dt_limit, segment_ids, plan.chunks, walks)
    x, z = slices.values(x), None if z is None else slices.values(z)
    B, C = slices.keys(B), slices.keys(C)
    D = None if D is None else slices.skip(D)
    state = None if initial_state is None else slices.states(initial_state)
    written = {"x": x, "B": B, "factors": factors, "first_visible": first_visible}
    added, kept = states_of_parts(plan=plan, walks=walks, **written) if plan.parts > 1 else (None, None)
    read = {"C": C, "D": D, "z": z, "state": state, "added": added, "kept": kept}
    y, final = walk(plan=plan, walks=walks, **written, **read, keep_state=return_final_state)
    y = slices.without_filling(y)
    return (y, slices.states_without_filling(final)) if return_final_state else y


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
        """Seen on an H100: 2.1 for a chunk, 0.9 for one of which only the state is added up; a launch, and its states."""
        per_part, rounds = -(-chunks // parts), -(-blocks * parts // PROCESSORS)
        if parts == 1:
            return 2.1 * rounds * per_part
        first_rounds = -(-blocks * (parts - 1) // PROCESSORS)
        return (2.1 * rounds + 0.9 * first_rounds) * per_part + 3 + rounds * (4 + parts)

    parts = min(range(1, min(chunks, 32) + 1), key=microseconds)
    parts = -(-chunks // -(-chunks // parts))  # no part behind the end
    return Plan(heads, parts, parts * -(-chunks // parts))


# The kernels.


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
    walks=ONE_WALK,
):
    """(y [k*b l slices 64], the final state [k*b slices 64 n] or None)

    `factors` and `first_visible` are those of `prepare`; x, z [b l slices 64], B, C [b l g n], or with k*b rows; D
    [k*slices] or [k*slices 64], state [b slices 64 n] that enters the sequence, `added` and `kept` of `states_of_parts`.
    """
    inputs = {
        "x": x,
        "B": B,
        "factors": factors,
        "first_visible": first_visible,
        "C": C,
        "D": D,
        "z": z,
        "state": state,
        "added": added,
        "kept": kept,
    }
    rows = factors.shape[0]
    out_type = {"y": jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype)}
    if keep_state:
        out_type["state"] = jax.ShapeDtypeStruct((rows, *x.shape[2:], B.shape[3]), jnp.float32)
    results = _launch("ssd_walk", plan, plan.parts, inputs, out_type, walks)
    return results["y"], results.get("state")


def states_of_parts(*, plan, x, B, factors, first_visible=None, walks=ONE_WALK):
    """What each part but the last adds to the state, and how much it keeps of the one before, the same 64 times.

    [k*b parts-1 slices 64 n] and [k*b parts-1 slices 64], both where the part ends; arguments as those of `walk`.
    """
    inputs = {"x": x, "B": B, "factors": factors, "first_visible": first_visible}
    shape = (factors.shape[0], plan.parts - 1, *x.shape[2:])
    out_type = {
        "added": jax.ShapeDtypeStruct((*shape, B.shape[3]), jnp.float32),
        "kept": jax.ShapeDtypeStruct(shape, jnp.float32),
    }
    results = _launch("ssd_states", plan, plan.parts - 1, inputs, out_type, walks)
    return results["added"], results["kept"]


def _launch(name, plan, parts, inputs, out_type, walks) -> dict:
    """Runs a kernel over the first `parts` parts."""
    inputs = {name: a for name, a in inputs.items() if a is not None}
    x, factors = inputs["x"], inputs["factors"]
    rows, heads = factors.shape[:2]
    slices = x.shape[2]
    groups, n = inputs["B"].shape[2:]
    block = Block(
        plan.heads, plan.chunks_per_part, plan.parts, slices, groups, slices // heads, n, x.dtype, rows, walks
    )
    results = plgpu.kernel(
        functools.partial(_body, block, [*inputs], [*out_type]),
        out_type=tuple(out_type.values()),
        scratch_types=_shared_memory(block, inputs),
        grid=(rows, parts, slices // plan.heads),  # the last axis is the fastest: neighbours read neighbouring memory
        grid_names=("batch", "part", "block"),
        num_threads=plan.heads + 1,
        thread_name="warpgroup",
        kernel_name=name,
        compiler_params=COMPILER_PARAMS,  # for the barriers see `_shared_memory`
    )(*inputs.values())
    return dict(zip(out_type, results, strict=True))


@dataclasses.dataclass(frozen=True)
class Block:
    """What a thread block does: `heads` slices, one for each warpgroup, over `chunks` chunks of one part."""

    heads: int
    chunks: int
    parts: int
    slices: int
    groups: int
    slices_per_head: int
    n: int
    dtype: jnp.dtype
    rows: int
    walks: Walks

    @property
    def backwards(self):
        """Whether this block walks from the end."""
        return self.walks.backwards(lax.axis_index("batch"), self.rows)

    def tokens(self, number):
        """Where the tokens of the chunk lie that the walk meets as number `number`."""
        return pl.ds(mirrored(self.backwards, number, self.parts * self.chunks) * CHUNK, CHUNK)


def _shared_memory(block: Block, inputs: dict) -> dict:
    """The buffers of a thread block: a ring of chunks that copies fill, and what each warpgroup hands to wgmma.

    A warpgroup overwrites `state`, `written` and `y` only when all of its warps are done with what was there. In the
    walk with outputs the barrier before y is stored comes after all products of a chunk; in the walk without, a buffer
    of `written` is used again after three chunks, and the barrier of the chunk before comes after its product.
    """
    heads, n, dtype = block.heads, block.n, block.dtype
    outputs = "C" in inputs
    stages = _stages(block, inputs)
    copies = sum(name in inputs for name in ("B", "C", "first_visible"))
    copies += heads * sum(name in inputs for name in ("x", "z", "factors"))
    scratch = {
        "x": square(dtype, stages, heads),
        "B": operand(dtype, stages, CHUNK, n),
        "factors": plgpu.SMEM((stages, heads, inputs["factors"].shape[3], CHUNK), jnp.float32),
        "written": operand(dtype, heads, 1 if outputs else 3, CHUNK, CHUNK),
        "filled": plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
        "consumed": plgpu.Barrier(num_arrivals=heads, num_barriers=stages),
    }
    if outputs:
        scratch |= {
            "C": operand(dtype, stages, CHUNK, n),
            "state": operand(dtype, heads, CHUNK, n),
            "y": square(dtype, heads),
        }
        if heads == 2:  # the two issue their products in turn, so one weights scores while the other multiplies
            scratch["turn"] = plgpu.Barrier(num_barriers=2)
    if "z" in inputs:
        scratch["z"] = square(dtype, stages, heads)
    if "first_visible" in inputs:
        scratch["first_visible"] = plgpu.SMEM((stages, CHUNK), jnp.int32)
    return scratch


def _stages(block: Block, inputs: dict) -> int:
    """How many chunks fit into shared memory at once, at most 4."""
    tile, wide, vector = CHUNK * CHUNK * 2, CHUNK * block.n * 2, CHUNK * 4
    fixed = block.heads * (2 * tile + wide if "C" in inputs else 3 * tile) + 1024
    stage = (1 + ("C" in inputs)) * wide + ("first_visible" in inputs) * vector
    stage += block.heads * ((1 + ("z" in inputs)) * tile + inputs["factors"].shape[3] * vector)
    return min(4, (SHARED_MEMORY - fixed) // stage)


def _body(block, input_names, output_names, *refs, **buffers):
    refs = dict(zip([*input_names, *(f"out {name}" for name in output_names)], refs, strict=True))
    for name in ("x", "y", "z"):
        if name in buffers:
            buffers[name], buffers[f"{name} flat"] = buffers[name]
    warpgroup = lax.axis_index("warpgroup")
    limit_registers = block.heads > 1  # with two warpgroups each thread has all it can use

    @pl.when(warpgroup < block.heads)
    def _():
        if limit_registers:
            plgpu.set_max_registers(232, action="increase")
        (_compute if "C" in refs else _add_up)(block, refs, buffers)

    @pl.when(warpgroup == block.heads)
    def _():
        if limit_registers:
            plgpu.set_max_registers(40, action="decrease")
        _copy(block, refs, buffers)


def _place(block):
    """(batch, part, first slice of the block, first chunk of the part)"""
    part = lax.axis_index("part")
    return lax.axis_index("batch"), part, lax.axis_index("block") * block.heads, part * block.chunks


def _copy(block, refs, buffers):
    """Keeps the ring filled."""
    batch, _, first, first_chunk = _place(block)
    stages = buffers["B"].shape[0]
    group = lax.div(first, block.slices // block.groups)

    def fetch(step, slot):
        number = first_chunk + (step if "C" in refs else block.chunks - 1 - step)
        chunk, tokens = mirrored(block.backwards, number, block.parts * block.chunks), block.tokens(number)

        def copy(source, target):
            plgpu.copy_gmem_to_smem(source, target, buffers["filled"].at[slot])

        for name in ("B", "C"):
            if name in refs:
                copy(refs[name].at[shared(refs[name], batch), tokens, group], buffers[name].at[slot])
        if "first_visible" in refs:
            copy(refs["first_visible"].at[batch, chunk], buffers["first_visible"].at[slot])
        for i in range(block.heads):
            head = lax.div(first + i, block.slices_per_head)
            copy(refs["factors"].at[batch, head, chunk], buffers["factors"].at[slot, i])
            for name in ("x", "z"):
                if name in refs:
                    source = refs[name].at[shared(refs[name], batch), tokens, first + i]
                    copy(source, buffers[f"{name} flat"].at[slot, i])

    keep_filled(fetch, block.chunks, stages, buffers["consumed"])


def _add_up(block, refs, buffers):
    """A warpgroup adds up what the tokens of one slice leave in the state where the part ends, from the end backwards."""
    batch, part, first, _ = _place(block)
    warpgroup = lax.axis_index("warpgroup")
    stages, packed = buffers["B"].shape[0], "first_visible" in refs
    end = choose(block.backwards, 0, CHUNK - 1)
    row = plgpu.broadcasted_iota(jnp.int32, (CHUNK,), 0, layout=ROWS)

    def loop(carry):
        state_acc, kept = carry

        @pl.loop(0, block.chunks)
        def _(step):
            slot = lax.rem(step, stages)
            plgpu.barrier_wait(buffers["filled"].at[slot])
            factors = buffers["factors"].at[slot, warpgroup]
            later = kept[...]  # an exponent: how much is left of this chunk's state where the part ends
            to_end = jnp.exp2(later + factors[0, end] - load(factors.at[1], ROWS))
            kept[...] = later + factors[0, end]
            if packed:
                start = start_of_sequence(buffers["first_visible"][slot, CHUNK - 1])
                to_end = jnp.where(row >= start, to_end, 0.0)
                kept[...] = jnp.where(start < 0, kept[...], -jnp.inf)
            written = load(buffers["x"].at[slot, warpgroup], MATRIX).astype(jnp.float32) * rows(to_end)
            tile = buffers["written"].at[warpgroup, lax.rem(step, 3)]
            tile[...] = written.astype(block.dtype)
            plgpu.commit_smem()
            plgpu.wgmma(state_acc, tile.transpose((1, 0)), buffers["B"].at[slot])
            plgpu.wgmma_wait(1)  # the previous chunk's is done, this one goes on

            @pl.when(step > 0)
            def _():
                plgpu.barrier_arrive(buffers["consumed"].at[lax.rem(step + stages - 1, stages)])

    nothing = plgpu.layout_cast(jnp.zeros(CHUNK, jnp.float32), ROWS)
    state, kept = pl.run_state(loop)((plgpu.ACC.init(zeros(CHUNK, block.n)), nothing))
    refs["out added"].at[batch, part, first + warpgroup][...] = state
    refs["out kept"].at[batch, part, first + warpgroup][...] = jnp.exp2(kept)


def _compute(block, refs, buffers):
    """A warpgroup walks along the chunks of one slice."""
    batch, part, first, first_chunk = _place(block)
    warpgroup = lax.axis_index("warpgroup")
    one, stages, dtype = first + warpgroup, buffers["B"].shape[0], block.dtype
    packed, taking_turns = "first_visible" in refs, "turn" in buffers
    written_tile, state_tile = buffers["written"].at[warpgroup, 0], buffers["state"].at[warpgroup]
    end = choose(block.backwards, 0, CHUNK - 1)
    row, column = times(ROWS, block.backwards), times(COLUMNS, block.backwards)

    state = zeros(CHUNK, block.n)
    if "state" in refs:
        state = load(refs["state"].at[batch, one], MATRIX, device_memory=True)
    if "added" in refs:

        def after(earlier, state):
            kept = load(refs["kept"].at[batch, earlier, one], ROWS, device_memory=True)
            kept = lax.broadcast_in_dim(kept, state.shape, [0])
            return state * kept + load(refs["added"].at[batch, earlier, one], MATRIX, device_memory=True)

        state = lax.fori_loop(0, part, after, state)
    skip = None
    if "D" in refs:
        own = block.walks.of(batch, block.rows) * block.slices + one
        per_head = len(refs["D"].shape) == 1
        skip = refs["D"][own] if per_head else columns(load(refs["D"].at[own], COLUMNS, device_memory=True))

    if taking_turns:

        @pl.when(warpgroup == 1)
        def _():
            plgpu.barrier_arrive(buffers["turn"].at[0])

    def step(chunk, state):
        slot = lax.rem(chunk, stages)
        plgpu.barrier_wait(buffers["filled"].at[slot])
        if taking_turns:
            plgpu.barrier_wait(buffers["turn"].at[warpgroup])
        x_tile, B_tile = buffers["x"].at[slot, warpgroup], buffers["B"].at[slot]
        factors = buffers["factors"].at[slot, warpgroup]
        last = factors[0, end]
        kept = jnp.exp2(last)
        i = rows(lax.optimization_barrier(row))  # or the compiler keeps a whole mask in registers from chunk to chunk
        j = columns(column)
        if packed:
            first_visible = rows(load(buffers["first_visible"].at[slot], ROWS))
            start = start_of_sequence(buffers["first_visible"][slot, CHUNK - 1])
            kept = jnp.where(start < 0, kept, 0.0)

        def products(accumulators):
            """Each is issued as early as its operands exist: the tensor cores work while the scores are weighted."""
            scores_acc, y_acc, state_acc = accumulators
            C = buffers["C"].at[slot]
            if block.n <= 128:  # from registers both products run faster; a wider one does not fit
                C = load(C, MATRIX)
            plgpu.wgmma(scores_acc, C, B_tile.transpose((1, 0)))

            x = load(x_tile, MATRIX)
            written = x.astype(jnp.float32) * rows(jnp.exp2(last - load(factors.at[1], ROWS)))
            if packed:
                written = jnp.where(i >= start, written, 0.0)
            written_tile[...] = written.astype(dtype)
            state_tile[...] = state.astype(dtype)
            plgpu.commit_smem()
            plgpu.wgmma(y_acc, C, state_tile.transpose((1, 0)))
            plgpu.wgmma(state_acc, written_tile.transpose((1, 0)), B_tile)
            if taking_turns:
                plgpu.barrier_arrive(buffers["turn"].at[1 - warpgroup])

            s, u = load(factors.at[0], ROWS), load(factors.at[1], COLUMNS)
            decays = jnp.exp2(rows(s) - columns(u))
            visible = (i >= j) & (j >= first_visible) if packed else i >= j
            scores = plgpu.wgmma_accumulator_load(scores_acc, wait_n=2)
            weights = jnp.where(visible, scores * decays, 0.0).astype(dtype)

            y = plgpu.wgmma_accumulator_load(y_acc, wait_n=1) * rows(jnp.exp2(s))
            if packed:
                y = jnp.where(first_visible < 0, y, 0.0)
            if skip is not None:
                y = y + skip * x.astype(jnp.float32)
            y_acc[...] = y
            plgpu.wgmma(y_acc, weights, x_tile)
            y = plgpu.wgmma_accumulator_load(y_acc, wait_n=0)

            if "z" in refs:
                z = load(buffers["z"].at[slot, warpgroup], MATRIX).astype(jnp.float32)
                y = y * (z / (1.0 + jnp.exp2(z * -math.log2(math.e))))
            if packed:
                y = jnp.where(first_visible < CHUNK, y, 0.0)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the previous chunk's y
            buffers["y"].at[warpgroup][...] = y.astype(dtype)
            plgpu.commit_smem()
            tokens = block.tokens(first_chunk + chunk)
            plgpu.copy_smem_to_gmem(buffers["y flat"].at[warpgroup], refs["out y"].at[batch, tokens, one])

        square = zeros(CHUNK, CHUNK)
        accumulators = tuple(map(plgpu.ACC.init, (square, square, state * kept)))
        *_, state = pl.run_state(products)(accumulators)
        plgpu.barrier_arrive(buffers["consumed"].at[slot])
        return state

    state = lax.fori_loop(0, block.chunks, step, state)
    if "out state" in refs:

        @pl.when(part == block.parts - 1)
        def _():
            refs["out state"].at[batch, one][...] = state

    plgpu.wait_smem_to_gmem(0)
