"""The states at the boundaries of all chunks, which the backward kernel reads (Pallas, Mosaic GPU).

Two walks in one launch. Forward: the state S that enters each chunk. Backward, along dy and C instead of x and B: the
gradient dS of the state that leaves each chunk,

    S'   = 2^from_state_Q S  + sum_j 2^written_j x_j B_j^T
    dS'  = 2^from_state_Q dS + sum_i 2^from_state_i dy_i C_i^T      (the gradient of the state that entered)

with the exponents of `exponents.prepare_backward`. Both run in float32 in registers and are kept in 16 bits. Of walks
from the end (`pallas_kernels.walks`) "forward" means from the last chunk to the first.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import load
from pallas_kernels.ssd.pallas_gpu.exponents import FROM_STATE, WRITTEN
from pallas_kernels.ssd.pallas_gpu.tiles import (
    CHUNK,
    COMPILER_PARAMS,
    MATRIX,
    ROWS,
    keep_filled,
    operand,
    rows,
    square,
    zeros,
)
from pallas_kernels.walks import ONE_WALK, Walks, choose, mirrored, shared

STAGES = 3


def boundary_states(*, x, dy, B, C, factors, ends=None, walks=ONE_WALK):
    """(states [2 b chunks slices 64 n] in the dtype of x: S and dS at each chunk, dS' of the first chunk [b slices 64 n]).

    x, dy [b l slices 64], B, C [b l g n], factors [b h chunks 5 64], ends [2 b slices 64 n] float32: the state that
    enters the first chunk and the gradient of the one that leaves the last, zeros if None. Of k walks factors and
    results have k*b rows, x, dy, B and C b or k*b.
    """
    slices = x.shape[2]
    groups, n = B.shape[2:]
    batch, heads, chunks, rows_of_factors = factors.shape[:4]
    heads_together = 2 if slices // groups % 2 == 0 else 1
    block = Block(heads_together, chunks, slices, groups, slices // heads, n, x.dtype, batch, walks)
    inputs = {"x": x, "dy": dy, "B": B, "C": C, "factors": factors, "ends": ends}
    inputs = {name: a for name, a in inputs.items() if a is not None}
    stages, dtype = STAGES, x.dtype
    scratch = {
        "values": square(dtype, stages, block.heads),
        "keys": operand(dtype, stages, CHUNK, n),
        "factors": plgpu.SMEM((stages, block.heads, rows_of_factors, CHUNK), jnp.float32),
        "written": operand(dtype, block.heads, 2, CHUNK, CHUNK),
        "state": operand(dtype, block.heads, 2, CHUNK, n),
        "filled": plgpu.Barrier(num_arrivals=1 + 2 * block.heads, num_barriers=stages),
        "consumed": plgpu.Barrier(num_arrivals=block.heads, num_barriers=stages),
    }
    return plgpu.kernel(
        functools.partial(_body, block, [*inputs]),
        out_type=(
            jax.ShapeDtypeStruct((2, batch, chunks, slices, CHUNK, n), dtype),
            jax.ShapeDtypeStruct((batch, slices, CHUNK, n), jnp.float32),
        ),
        scratch_types=scratch,
        grid=(batch, 2, slices // block.heads),
        grid_names=("batch", "direction", "block"),
        num_threads=block.heads + 1,
        thread_name="warpgroup",
        kernel_name="ssd_boundaries",
        # A buffer is written again two chunks later: in between lies a barrier that all its readers have passed.
        compiler_params=COMPILER_PARAMS,
    )(*inputs.values())


@dataclasses.dataclass(frozen=True)
class Block:
    """What a thread block does: `heads` slices, one for each warpgroup, over all chunks."""

    heads: int
    chunks: int
    slices: int
    groups: int
    slices_per_head: int
    n: int
    dtype: jnp.dtype
    rows: int
    walks: Walks

    @property
    def backwards(self):
        """Whether the walk of this block goes from the end, and its gradient the other way."""
        return self.walks.backwards(lax.axis_index("batch"), self.rows)


def _body(block, input_names, *refs, **buffers):
    refs = dict(zip([*input_names, "states", "entered"], refs, strict=True))
    buffers["values"], buffers["values flat"] = buffers["values"]
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup < block.heads)
    def _():
        _walk(block, refs, buffers)

    @pl.when(warpgroup == block.heads)
    def _():
        for direction, values, keys in ((0, "x", "B"), (1, "dy", "C")):

            @pl.when(lax.axis_index("direction") == direction)
            def _(direction=direction, values=refs[values], keys=refs[keys]):
                _copy(block, refs["factors"], values, keys, direction, buffers)


def _copy(block, factors, values, keys, direction, buffers):
    """Keeps the ring filled."""
    batch, first = lax.axis_index("batch"), lax.axis_index("block") * block.heads
    group = lax.div(first, block.slices // block.groups)

    def fetch(step, slot):
        step = jnp.int32(
            step
        )  # tokens behind the end are read as zeros; JAX would refuse them were the number a constant
        number = block.chunks - 1 - step if direction else step
        chunk = mirrored(block.backwards, number, block.chunks)
        tokens = pl.ds(chunk * CHUNK, CHUNK)

        def copy(source, target):
            plgpu.copy_gmem_to_smem(source, target, buffers["filled"].at[slot])

        copy(keys.at[shared(keys, batch), tokens, group], buffers["keys"].at[slot])
        for i in range(block.heads):
            head = lax.div(first + i, block.slices_per_head)
            copy(factors.at[batch, head, chunk], buffers["factors"].at[slot, i])
            copy(values.at[shared(values, batch), tokens, first + i], buffers["values flat"].at[slot, i])

    keep_filled(fetch, block.chunks, STAGES, buffers["consumed"])


def _walk(block, refs, buffers):
    """A warpgroup walks along the chunks of one slice, in one direction."""
    batch, direction = lax.axis_index("batch"), lax.axis_index("direction")
    warpgroup = lax.axis_index("warpgroup")
    one = lax.axis_index("block") * block.heads + warpgroup
    row = jnp.where(direction == 0, WRITTEN, FROM_STATE)
    end = choose(block.backwards, 0, CHUNK - 1)

    state = zeros(CHUNK, block.n)
    if "ends" in refs:
        state = load(refs["ends"].at[direction, batch, one], MATRIX, device_memory=True)

    def step(step, state):
        slot, other = lax.rem(step, STAGES), lax.rem(step, 2)
        number = jnp.where(direction == 0, step, block.chunks - 1 - step)
        chunk = mirrored(block.backwards, number, block.chunks)
        plgpu.barrier_wait(buffers["filled"].at[slot])
        factors = buffers["factors"].at[slot, warpgroup]
        kept = jnp.exp2(factors[FROM_STATE, end])
        written_tile, state_tile = buffers["written"].at[warpgroup, other], buffers["state"].at[warpgroup, other]
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # the state two chunks before
        values = load(buffers["values"].at[slot, warpgroup], MATRIX).astype(jnp.float32)
        written_tile[...] = (values * rows(jnp.exp2(load(factors.at[row], ROWS)))).astype(block.dtype)
        state_tile[...] = state.astype(block.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(state_tile, refs["states"].at[direction, batch, chunk, one])

        def product(state_acc):
            plgpu.wgmma(state_acc, written_tile.transpose((1, 0)), buffers["keys"].at[slot])

        state = pl.run_state(product)(plgpu.ACC.init(state * kept))
        plgpu.barrier_arrive(buffers["consumed"].at[slot])
        return state

    state = lax.fori_loop(0, block.chunks, step, state)

    @pl.when(direction == 1)
    def _():
        refs["entered"].at[batch, one][...] = state

    plgpu.wait_smem_to_gmem(0)
