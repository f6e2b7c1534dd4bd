"""One token of SSD on Hopper: the state is read once and written once, in place (Pallas, Mosaic GPU).

Nothing but the state counts: a thread block holds some rows of the state of one head in its registers, and enough
blocks share a processor to keep its memory busy. The state is a mutable reference that the kernel reads and writes, so
XLA copies it only where the caller goes on using the old one.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import FLOATS, PROCESSORS, launch, load, load32, silu

LARGEST = 32 * 128  # numbers of the state in one thread block: 32 registers of each thread


def why_not(state, x, *others) -> str | None:
    """Why a state [.. b h p n], x [b h p] and other arrays are not for this kernel."""
    head_dim, n = state.shape[-2:]
    if state.dtype not in (jnp.float32, jnp.bfloat16):
        return f"the state is {state.dtype}; the kernel keeps it in float32 or bfloat16"
    for a in (x, *others):
        if a is not None and a.dtype not in FLOATS:
            return f"an argument is {a.dtype}; the kernel takes float32, bfloat16 and float16"
    if n % 16 or n > 256:
        return f"the state size is {n}; the kernel takes multiples of 16 up to 256"
    if head_dim % _height(n):
        return f"heads are {head_dim} wide; for a state size of {n} the kernel takes multiples of {_height(n)}"
    return None


@dataclasses.dataclass(frozen=True)
class Tile:
    """What a thread block holds: `rows` of the p channels of a head, each with its n numbers."""

    rows: int
    n: int

    @property
    def layout(self):
        """A group of 8 (or 4) lanes reads 4 neighbouring numbers each, one or half a cache line of a row."""
        lanes = _lanes(self.n)
        warp = (32 // lanes, 4 * lanes)
        tiling = plgpu.Tiling(((4 * warp[0], warp[1]), warp, (4,)))
        return plgpu.Layout.TILED(tiling, warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)

    @property
    def over_rows(self):
        """The layout of a vector [rows]."""
        return self.layout.reduce(1)

    @property
    def over_columns(self):
        """The layout of a vector [n]."""
        return self.layout.reduce(0)

    def spread(self, vector, axis: int):
        """A vector along `axis` of the tile, repeated along the other."""
        return plgpu.layout_cast(lax.broadcast_in_dim(vector, (self.rows, self.n), [axis]), self.layout)


def choose_tile(batch: int, heads: int, head_dim: int, n: int) -> Tile:
    """The tallest tile that leaves enough blocks to fill the device; seen on an H100 at batches 1, 8 and 64."""
    heights = [
        rows for rows in range(_height(n), head_dim + 1, _height(n)) if head_dim % rows == 0 and rows * n <= LARGEST
    ]
    many = [rows for rows in heights if batch * heads * (head_dim // rows) >= 8 * PROCESSORS]
    return Tile(max(many, default=heights[0]), n)


def _lanes(n: int) -> int:
    return 8 if n % 32 == 0 else 4


def _height(n: int) -> int:
    """Rows that the 4 warps of a block read at once."""
    return 4 * 32 // _lanes(n)


def ssd_step(state, x, dt, A, B, C, *, D, z, dt_bias, dt_softplus, dt_limit, tile: Tile | None = None):
    """(y, next state); arguments as those of `pallas_kernels.ssd_step`."""
    batch, heads, head_dim, n = state.shape
    tile = tile or choose_tile(batch, heads, head_dim, n)
    inputs = {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "z": z, "dt_bias": dt_bias}
    inputs = {name: a for name, a in inputs.items() if a is not None}
    state = jax.new_ref(state)
    body = functools.partial(_body, [*inputs], tile, heads // B.shape[1], dt_softplus, dt_limit)
    y = launch(
        body,
        "ssd_step",
        jax.ShapeDtypeStruct(x.shape, x.dtype),
        grid={"batch": batch, "head": heads, "part": head_dim // tile.rows},
    )(*inputs.values(), state)
    return y, jax.freeze(state)


def _body(names, tile, heads_per_group, dt_softplus, dt_limit, *refs):
    *inputs, state, y = refs
    refs = dict(zip(names, inputs, strict=True))
    batch, head, rows = place(tile)
    group = lax.div(head, heads_per_group)
    state = state.at[batch, head, rows]
    before = load(state, tile.layout, device_memory=True)  # asked for first: it takes longest
    x = load32(refs["x"].at[batch, head, rows], tile.over_rows)
    B, C = (load32(refs[name].at[batch, group], tile.over_columns) for name in ("B", "C"))
    bias = refs["dt_bias"][head] if "dt_bias" in refs else None
    dt = step_size(refs["dt"][batch, head], bias, dt_softplus, dt_limit)
    after, result = advance(tile, before, x, dt, refs["A"][head], B, C, skip(refs.get("D"), head, rows, tile))
    if "z" in refs:
        z = load32(refs["z"].at[batch, head, rows], tile.over_rows)
        result = result * silu(z)
    state[...] = after.astype(before.dtype)
    y.at[batch, head, rows][...] = result.astype(y.dtype)


# Pieces of a kernel.


def place(tile: Tile):
    """(batch, head, rows) of this block."""
    return lax.axis_index("batch"), lax.axis_index("head"), pl.ds(lax.axis_index("part") * tile.rows, tile.rows)


def step_size(dt, bias, softplus: bool, limit: tuple[float, float]):
    """One number; as `pallas_kernels.ssd.discretize`."""
    dt = dt.astype(jnp.float32)
    if bias is not None:
        dt = dt + bias.astype(jnp.float32)
    if softplus:
        # log(1 + e) without losing a small e: the error of u = 1 + e cancels in log(u) / (u - 1).
        e = jnp.exp(-jnp.abs(dt))
        u = 1.0 + e
        dt = jnp.maximum(dt, 0.0) + jnp.where(u == 1.0, e, jnp.log(u) * (e / (u - 1.0)))
    low, high = limit
    return jnp.where(dt < low, low, jnp.where(dt > high, high, dt))


def skip(D, head, rows, tile: Tile):
    """What of x goes past the state: nothing, a number, or a vector over the rows."""
    if D is None:
        return None
    if len(D.shape) == 1:
        return D[head].astype(jnp.float32)
    return load32(D.at[head, rows], tile.over_rows)


def advance(tile: Tile, state, x, dt, A, B, C, D):
    """The recurrence on a tile: (next state, y) in float32."""
    decay = jnp.exp(dt * A.astype(jnp.float32))
    state = decay * state.astype(jnp.float32) + tile.spread(dt * x, 0) * tile.spread(B, 1)
    y = jnp.sum(state * tile.spread(C, 1), axis=1)
    return state, y if D is None else y + D * x
