"""The gradient of the walk: a forward walk leaves the state that enters each chunk, a reversed one does the rest.

The reversed walk carries dS, the gradient of the state that leaves a chunk. With dy the gradient of y before the gate,
w_ij = exp(s_i - s_j) for i >= j and 0 elsewhere, e_j = exp(s_end - s_j), and M_ij = w_ij (dy_i . x_j):

    r_j   = sum_i (C_i . B_j) w_ij dy_i + e_j dS B_j          dx = dt r + D dy,   ddt = x . r
    dB_j  = sum_heads sum_i dt_j M_ij C_i + dt_j e_j dS^T x_j
    dC_i  = sum_heads sum_j dt_j M_ij B_j + exp(s_i) S^T dy_i
    dS_in = exp(s_end) dS + sum_i exp(s_i) dy_i C_i^T

The gradient of dt A at token t is a sum over everything that decays through t: with W_ij = (C_i . B_j) dt_j M_ij,
u_i = exp(s_i) dy_i . S C_i and v_j = dt_j e_j x_j . dS B_j,

    da_t  = sum_{j < t <= i} W_ij + sum_{i >= t} u_i + sum_{j < t} v_j + exp(s_end) <dS, S>

No difference of large sums is taken, as there would be if the gradient of s were computed first.

Matrices of two tokens stand transposed here, [j i]: then no product needs one of them turned. Heads are the inner loop
of the grid, so dB and dC add up in VMEM in a fixed order.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.ssd.pallas_tpu.blocks import (
    Place,
    block_spec,
    columns_by_columns,
    rows_by_columns,
    rows_by_rows,
    tokens_of,
)
from pallas_kernels.ssd.pallas_tpu.forward import walk
from pallas_kernels.ssd.pallas_tpu.heads import only, over_lanes, sum_by_head
from pallas_kernels.ssd.pallas_tpu.layout import Layout
from pallas_kernels.ssd.pallas_tpu.visibility import sees_nothing, start_of_last


def gradients(operands: dict[str, Array], layout: Layout, precision: lax.Precision, dy, dfinal=None) -> dict:
    """The gradients of x, dt, a, B, C and where there are some D, z, state, by the names of the operands.

    Args:
        operands: as of `walk`; the gradient of s is that of its increments a = dt A.
        dy: [b l width]. dfinal: of the final state [b n width], or None.
    """
    if "z" in operands:
        recomputed = walk(operands | {"dy": dy}, layout, precision, ("states", "dz"))
    else:
        recomputed = walk(operands, layout, precision, ("states",))
    x, dt = operands["x"], operands["dt"]
    inputs = {name: a for name, a in operands.items() if name != "state"}
    inputs |= {"states": recomputed["states"], "dy": dy}
    if dfinal is not None:
        inputs["dfinal"] = dfinal

    outputs = {
        "dx": jax.ShapeDtypeStruct(x.shape, x.dtype),
        "ddt": jax.ShapeDtypeStruct(dt.shape, jnp.float32),
        "da": jax.ShapeDtypeStruct(dt.shape, jnp.float32),
        "dB": jax.ShapeDtypeStruct(operands["B"].shape, jnp.float32),
        "dC": jax.ShapeDtypeStruct(operands["C"].shape, jnp.float32),
    }
    if "D" in operands:
        outputs["dD"] = jax.ShapeDtypeStruct((layout.batch, 1, layout.width), jnp.float32)
    if "state" in operands:
        shape = (layout.batch, layout.lanes_of_state, layout.width)
        outputs["dstate"] = jax.ShapeDtypeStruct(shape, jnp.float32)

    chunks, blocks = layout.chunks, layout.group_blocks

    def place(batch, group, step, block):
        return Place(batch, group, group * blocks + block, chunks - 1 - step)

    def place_first(batch, group, step, block):
        """What is needed at the first step only stays where it was afterwards, so that nothing is copied."""
        return place(batch, group, step, jnp.where(step == 0, block, blocks - 1))

    def place_last(batch, group, step, block):
        return place(batch, group, step, jnp.where(step == chunks - 1, block, 0))

    def spec(name):
        special = {"dfinal": place_first, "dD": place_last, "dstate": place_last}
        return block_spec(name, layout, special.get(name, place))

    carried = {
        "dS": pltpu.VMEM((blocks, layout.lanes_of_state, layout.block), jnp.float32),
        "dD sum": pltpu.VMEM((blocks, 1, layout.block), jnp.float32),
    }
    results = pl.pallas_call(
        functools.partial(_step, layout, precision, [*inputs, *outputs, *carried]),
        out_shape=tuple(outputs.values()),
        grid=(layout.batch, layout.groups, chunks, blocks),
        in_specs=[spec(name) for name in inputs],
        out_specs=tuple(spec(name) for name in outputs),
        scratch_shapes=list(carried.values()),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
        ),
        name="ssd_backward",
    )(*inputs.values())
    results = {name.removeprefix("d"): a for name, a in zip(outputs, results, strict=True)}
    results["B"], results["C"] = (results[name].astype(operands[name].dtype) for name in ("B", "C"))
    if "D" in results:
        results["D"] = results["D"].sum(axis=0)
    if "z" in operands:
        results["z"] = recomputed["dz"]
    return results


def _step(layout, precision, names, *refs):
    refs = dict(zip(names, refs, strict=True))
    step, block = pl.program_id(2), pl.program_id(3)
    chunk = layout.chunks - 1 - step
    dS_ref, dD_ref = refs["dS"].at[block], refs["dD sum"].at[block]

    @pl.when(step == 0)
    def _():
        dS_ref[...] = refs["dfinal"][...] if "dfinal" in refs else jnp.zeros_like(dS_ref)
        dD_ref[...] = jnp.zeros_like(dD_ref)

    @pl.when(block == 0)
    def _():
        refs["dB"][...] = jnp.zeros_like(refs["dB"])
        refs["dC"][...] = jnp.zeros_like(refs["dC"])

    x, B, C = (tokens_of(refs[name], chunk, layout) for name in ("x", "B", "C"))
    dtype = x.dtype
    dy = tokens_of(refs["dy"], chunk, layout).astype(jnp.float32)
    if "z" in refs:
        z = tokens_of(refs["z"], chunk, layout).astype(jnp.float32)
        dy *= z * jax.nn.sigmoid(z)
    s, dt = refs["s"][...], refs["dt"][...]
    s_columns, dt_columns = jnp.transpose(s), jnp.transpose(dt)
    row = lax.broadcasted_iota(jnp.int32, (layout.chunk, layout.chunk), 0)
    column = lax.broadcasted_iota(jnp.int32, (layout.chunk, layout.chunk), 1)
    visible = row <= column  # j <= i
    from_state, to_end = jnp.exp(s), jnp.exp(jnp.minimum(s[:, -1:] - s, 0))
    kept = jnp.exp(s[:, -1:])
    if "first_visible" in refs:
        first_visible, start = refs["first_visible"][...], start_of_last(refs["first_visible"])
        dy = jnp.where(sees_nothing(refs["first_visible"]), 0, dy)
        visible &= row >= first_visible
        from_state = jnp.where(first_visible < 0, from_state, 0)
        to_end = jnp.where(lax.broadcasted_iota(jnp.int32, to_end.shape, 1) >= start, to_end, 0)
        kept = jnp.where(start < 0, kept, 0)

    # Through the states.
    S, dS = refs["states"][...], dS_ref[...]
    dS_operand = dS.astype(dtype)
    to_end_lanes = over_lanes(jnp.transpose(to_end), layout)
    r_end = to_end_lanes * rows_by_columns(B, dS_operand, precision)
    written = (x * over_lanes(dt_columns, layout) * to_end_lanes).astype(dtype)
    dy_state = dy * over_lanes(jnp.transpose(from_state), layout)
    u = sum_by_head(dy_state * rows_by_columns(C, S, precision), layout)
    v = dt * sum_by_head(x * r_end, layout)
    dy_state = dy_state.astype(dtype)
    dB = rows_by_rows(written, dS_operand, precision)
    dC = rows_by_rows(dy_state, S, precision)
    through = kept * sum_by_head(jnp.sum(dS * S, axis=0, keepdims=True), layout)
    kept_lanes = over_lanes(jnp.transpose(kept), layout)
    dS_ref[...] = kept_lanes * dS + columns_by_columns(C, dy_state, precision)

    # Within the chunk.
    scores = rows_by_rows(B, C, precision)
    dscores = jnp.zeros_like(scores)
    dy_operand = dy.astype(dtype)
    not_before, before = row >= column, row < column  # i >= t, j < t
    r_tiles, straddling = [], []
    for first in range(0, layout.block_heads, layout.tile_heads):
        lanes = slice(first * layout.head_lanes, (first + layout.tile_heads) * layout.head_lanes)
        r_tile = r_end[:, lanes]
        for head in range(first, first + layout.tile_heads):
            difference = jnp.minimum(s[head : head + 1] - s_columns[:, head : head + 1], 0)
            decays = jnp.exp(jnp.where(visible, difference, -jnp.inf))
            dy_head = only(head - first, dy_operand[:, lanes], layout)
            r_tile += rows_by_columns((scores * decays).astype(dtype), dy_head, precision)
            d = decays * dt_columns[:, head : head + 1] * rows_by_rows(x[:, lanes], dy_head, precision)
            dscores += d
            ends = rows_by_columns((scores * d).astype(dtype), not_before.astype(dtype), precision)
            straddling.append(jnp.sum(jnp.where(before, ends, 0), axis=0, keepdims=True))
        r_tiles.append(r_tile)
    r = jnp.concatenate(r_tiles, axis=1)
    dscores = dscores.astype(dtype)
    refs["dB"][...] += dB + rows_by_columns(dscores, C, precision)
    refs["dC"][...] += dC + columns_by_columns(dscores, B, precision)

    dx = r * over_lanes(dt_columns, layout)
    if "D" in refs:
        dx += refs["D"][...] * dy
        dD_ref[...] += jnp.sum(dy * x, axis=0, keepdims=True)
        refs["dD"][...] = dD_ref[...]
    refs["dx"][...] = dx.astype(dtype)
    refs["ddt"][...] = sum_by_head(x * r, layout)
    da = jnp.concatenate(straddling, axis=0) + through
    da += rows_by_columns(u, not_before.astype(jnp.float32), lax.Precision.HIGHEST)
    da += rows_by_columns(v, before.astype(jnp.float32), lax.Precision.HIGHEST)
    refs["da"][...] = da
    if "dstate" in refs:
        refs["dstate"][...] = dS_ref[...]
