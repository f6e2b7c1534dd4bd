"""The walk along the chunks of a sequence: the state stays in VMEM, each step multiplies one chunk of a block of heads.

The mathematics are those of `xla`. In a step, with the tokens of the chunk in rows and channels in lanes:

    y  = exp(s) (C S)  +  (C B^T * decays * dt) x  +  D x            times silu(z)
    S' = exp(s_end) S  +  B^T (exp(s_end - s) dt x)

C B^T is computed once for all heads of the block, which belong to one group, and both products with the state S
[n lanes] are as wide as the block. The next chunk is copied into VMEM meanwhile.
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
from pallas_kernels.ssd.pallas_tpu.heads import only, over_lanes
from pallas_kernels.ssd.pallas_tpu.layout import Layout
from pallas_kernels.ssd.pallas_tpu.visibility import seen, sees_nothing, start_of_last


def walk(operands: dict[str, Array], layout: Layout, precision: lax.Precision, wanted: tuple[str, ...]) -> dict:
    """The outputs named in `wanted`: y or dz (which needs dy), the `final` state, the `states` that enter the chunks.

    Args:
        operands: x, B, C, dt, s and where there are some z, D, state, first_visible, dy, laid out by `layout`.
    """
    if not {"y", "dz"} & {*wanted}:
        operands = {name: a for name, a in operands.items() if name not in ("C", "D", "z")}
    x = operands["x"]
    state_shape = (layout.batch, layout.lanes_of_state, layout.width)
    outputs = {
        "y": jax.ShapeDtypeStruct(x.shape, x.dtype),
        "final": jax.ShapeDtypeStruct(state_shape, jnp.float32),
        "states": jax.ShapeDtypeStruct((layout.batch, layout.chunks, *state_shape[1:]), x.dtype),
    }
    if "z" in operands:
        outputs["dz"] = jax.ShapeDtypeStruct(x.shape, operands["z"].dtype)
    outputs = {name: outputs[name] for name in wanted}

    def place(batch, block, chunk):
        return Place(batch, lax.div(block, layout.group_blocks), block, chunk)

    results = pl.pallas_call(
        functools.partial(_step, layout, precision, [*operands, *outputs]),
        out_shape=tuple(outputs.values()),
        grid=(layout.batch, layout.blocks, layout.chunks),
        in_specs=[block_spec(name, layout, place) for name in operands],
        out_specs=tuple(block_spec(name, layout, place) for name in outputs),
        scratch_shapes=[pltpu.VMEM((layout.lanes_of_state, layout.block), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        name="ssd_forward" if "y" in wanted else "ssd_states",
    )(*operands.values())
    return dict(zip(outputs, results, strict=True))


def _step(layout, precision, names, *refs):
    *refs, carried = refs
    refs = dict(zip(names, refs, strict=True))
    chunk = pl.program_id(2)

    @pl.when(chunk == 0)
    def _():
        carried[...] = refs["state"][...] if "state" in refs else jnp.zeros_like(carried)

    state = carried[...]
    if "states" in refs:
        refs["states"][...] = state.astype(refs["states"].dtype)

    x, B = tokens_of(refs["x"], chunk, layout), tokens_of(refs["B"], chunk, layout)
    s, dt = refs["s"][...], refs["dt"][...]
    to_end = dt * jnp.exp(jnp.minimum(s[:, -1:] - s, 0))
    kept = jnp.exp(jnp.transpose(s)[-1:])
    if "first_visible" in refs:
        start = start_of_last(refs["first_visible"])
        to_end = jnp.where(lax.broadcasted_iota(jnp.int32, to_end.shape, 1) >= start, to_end, 0)
        kept = jnp.where(start < 0, kept, 0)

    name = next((name for name in ("y", "dz") if name in refs), None)
    if name:
        result = _before_gate(layout, precision, refs, chunk, state, x, B)
        if "z" in refs:
            z = tokens_of(refs["z"], chunk, layout).astype(jnp.float32)
            gate = jax.nn.sigmoid(z)
            if name == "y":
                result *= z * gate
            else:
                dy = tokens_of(refs["dy"], chunk, layout).astype(jnp.float32)
                result *= dy * gate * (1 + z * (1 - gate))
        if "first_visible" in refs:
            result = jnp.where(sees_nothing(refs["first_visible"]), 0, result)
        refs[name][...] = result.astype(refs[name].dtype)

    written = (x * over_lanes(jnp.transpose(to_end), layout)).astype(x.dtype)
    state = over_lanes(kept, layout) * state + columns_by_columns(B, written, precision)
    carried[...] = state
    if "final" in refs:
        refs["final"][...] = state


def _before_gate(layout, precision, refs, chunk, state, x, B):
    """y without z, float32 [tokens lanes]."""
    C = tokens_of(refs["C"], chunk, layout)
    s, dt = refs["s"][...], refs["dt"][...]
    s_columns = jnp.transpose(s)
    from_state = jnp.exp(s_columns)
    i = lax.broadcasted_iota(jnp.int32, (layout.chunk, layout.chunk), 0)
    j = lax.broadcasted_iota(jnp.int32, (layout.chunk, layout.chunk), 1)
    visible = i >= j
    if "first_visible" in refs:
        first_visible = seen(refs["first_visible"])
        visible &= j >= first_visible
        from_state = jnp.where(first_visible < 0, from_state, 0)

    scores = rows_by_rows(C, B, precision)
    entered = over_lanes(from_state, layout) * rows_by_columns(C, state.astype(x.dtype), precision)
    tiles = []
    for first in range(0, layout.block_heads, layout.tile_heads):
        lanes = slice(first * layout.head_lanes, (first + layout.tile_heads) * layout.head_lanes)
        tile = entered[:, lanes]
        for head in range(first, first + layout.tile_heads):
            difference = jnp.minimum(s_columns[:, head : head + 1] - s[head : head + 1], 0)
            decays = jnp.exp(jnp.where(visible, difference, -jnp.inf))
            weights = (scores * decays * dt[head : head + 1]).astype(x.dtype)
            tile += rows_by_columns(weights, only(head - first, x[:, lanes], layout), precision)
        tiles.append(tile)
    y = jnp.concatenate(tiles, axis=1)
    return y + refs["D"][...] * x if "D" in refs else y
