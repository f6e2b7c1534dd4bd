"""A Mamba-2 mixer's step on Hopper in two launches (Pallas, Mosaic GPU).

The first does everything up to y: a thread block convolves the channels it needs, those of its rows of x and the B and
C of its group, and updates its rows of the state of one head. B and C are convolved again in every block, which takes
a fifth of the bytes of its state, from the cache, and saves a launch.

The second gates and normalises y, one block for each group of a row, while other blocks move the convolution state on
by one token; the first launch still read the old one. Both states change in place.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gradients import with_gradient_of
from pallas_kernels.hopper import launch, load, load32, silu, why_not_here  # noqa: F401, why_not_here: part of a backend
from pallas_kernels.mamba2_step import xla
from pallas_kernels.mamba2_step.sizes import Sizes, split_sizes
from pallas_kernels.ssd.pallas_gpu import step

THREADS = 128  # of a block


def why_not_mamba2_step(
    conv_state, ssm_state, zxbcdt, conv_weight, A, *, conv_bias=None, D=None, dt_bias=None, norm_weight=None, **_
) -> str | None:
    sizes = split_sizes(ssm_state, conv_weight)
    if conv_state.dtype != zxbcdt.dtype:
        return f"the convolution state is {conv_state.dtype}, zxbcdt {zxbcdt.dtype}; the kernel takes one dtype"
    reason = step.why_not(ssm_state, zxbcdt, conv_weight, A, conv_bias, D, dt_bias, norm_weight)
    if reason:
        return reason
    if conv_weight.shape[1] < 2:
        return "the convolution has one tap; the kernel takes two or more"
    if sizes.state % 64:
        return f"the state size is {sizes.state}; the kernel takes multiples of 64"
    if sizes.inner // sizes.groups % THREADS:
        return f"a group has {sizes.inner // sizes.groups} channels; the kernel takes multiples of {THREADS}"
    return None


def mamba2_step(conv_state, ssm_state, zxbcdt, conv_weight, A, **arguments):
    positional = {
        "conv_state": conv_state,
        "ssm_state": ssm_state,
        "zxbcdt": zxbcdt,
        "conv_weight": conv_weight,
        "A": A,
    }
    options = {name: arguments.pop(name) for name in ("dt_limit", "norm_eps", "norm_before_gate") if name in arguments}
    run = with_gradient_of(
        lambda arrays: xla.mamba2_step(**arrays, **options), lambda arrays: _two_launches(**arrays, **options)
    )
    return run(positional | {name: a for name, a in arguments.items() if a is not None})


def _two_launches(
    conv_state,
    ssm_state,
    zxbcdt,
    conv_weight,
    A,
    conv_bias=None,
    D=None,
    dt_bias=None,
    norm_weight=None,
    layer=None,
    active=None,
    dt_limit=(0.0, float("inf")),
    norm_eps=1e-5,
    norm_before_gate=False,
):
    sizes = split_sizes(ssm_state, conv_weight)
    batch = zxbcdt.shape[0]
    tile = step.choose_tile(batch, sizes.heads, sizes.head_dim, sizes.state)
    y = jax.ShapeDtypeStruct((batch, sizes.inner), zxbcdt.dtype)

    if layer is not None:
        layer = layer.astype(jnp.int32).reshape(1)
    if active is not None:
        active = active.astype(jnp.int32)
    inputs = {
        "layer": layer,
        "active": active,
        "zxbcdt": zxbcdt,
        "conv_state": conv_state,
        "conv_weight": conv_weight,
        "conv_bias": conv_bias,
        "A": A,
        "D": D,
        "dt_bias": dt_bias,
    }
    inputs = {name: a for name, a in inputs.items() if a is not None}
    ssm_state = jax.new_ref(ssm_state)
    y = launch(
        functools.partial(_scan, [*inputs], sizes, tile, dt_limit),
        "mamba2_step_scan",
        y,
        grid={"batch": batch, "head": sizes.heads, "part": sizes.head_dim // tile.rows},
    )(*inputs.values(), ssm_state)

    inputs = {"layer": layer, "active": active, "y": y, "zxbcdt": zxbcdt, "norm_weight": norm_weight}
    inputs = {name: a for name, a in inputs.items() if a is not None}
    conv_state = jax.new_ref(conv_state)
    y = launch(
        functools.partial(_norm, [*inputs], sizes, norm_eps, norm_before_gate),
        "mamba2_step_norm",
        jax.ShapeDtypeStruct(y.shape, y.dtype),
        grid={"batch": batch, "group": sizes.groups, "part": 1 + _movers(sizes)},
    )(*inputs.values(), conv_state)
    return y, jax.freeze(conv_state), jax.freeze(ssm_state)


def _scan(names, sizes: Sizes, tile: step.Tile, dt_limit, *refs):
    *inputs, state, y = refs
    refs = dict(zip(names, inputs, strict=True))
    batch, head, rows = step.place(tile)
    group = lax.div(head, sizes.heads // sizes.groups)
    state = state.at[(*_layer(refs), batch, head, rows)]
    before = load(state, tile.layout, device_memory=True)  # asked for first: it takes longest
    zxbcdt, conv_state, dtype = refs["zxbcdt"], refs["conv_state"], y.dtype

    def convolved(first, width, layout):
        """Channels of [x | B | C] from `first` on, rounded as if they went through memory."""
        channels = pl.ds(first, width)
        taps = refs["conv_weight"].shape[1]
        window = [conv_state.at[(*_layer(refs), batch, tap, channels)] for tap in range(taps - 1)]
        window.append(zxbcdt.at[batch, pl.ds(sizes.inner + first, width)])
        total = load32(refs["conv_bias"].at[channels], layout) if "conv_bias" in refs else None
        for tap, ref in enumerate(window):
            term = load32(ref, layout) * load32(refs["conv_weight"].at[channels, tap], layout)
            total = term if total is None else total + term
        return silu(total).astype(dtype).astype(jnp.float32)

    @functools.partial(pl.run_scoped, shared=plgpu.SMEM((2, sizes.state), jnp.float32))
    def vectors(shared):
        """x, B and C; B and C by way of shared memory, where every thread finds the numbers it multiplies."""
        for i in range(2):
            first = sizes.inner + (i * sizes.groups + group) * sizes.state
            shared.at[i][...] = convolved(first, sizes.state, _one_each(sizes.state))
        x = convolved(head * sizes.head_dim + rows.start, tile.rows, tile.over_rows)
        plgpu.commit_smem()
        return x, *(load(shared.at[i], tile.over_columns, device_memory=True) for i in range(2))

    x, B, C = vectors

    dt = zxbcdt[batch, sizes.inner + sizes.channels + head]
    dt = step.step_size(dt, refs["dt_bias"][head] if "dt_bias" in refs else None, True, dt_limit)
    skip = step.skip(refs.get("D"), head, rows, tile)
    after, result = step.advance(tile, before, x, dt, refs["A"][head], B, C, skip)
    after = after.astype(before.dtype)
    state[...] = jnp.where(refs["active"][batch] > 0, after, before) if "active" in refs else after
    y.at[batch, pl.ds(head * sizes.head_dim + rows.start, tile.rows)][...] = result.astype(dtype)


def _norm(names, sizes: Sizes, eps, norm_before_gate, *refs):
    *inputs, conv_state, out = refs
    refs = dict(zip(names, inputs, strict=True))
    batch, group, part = (lax.axis_index(name) for name in ("batch", "group", "part"))
    zxbcdt = refs["zxbcdt"]

    def strided(width):
        """Neighbouring channels of a thread, as many as every row of zxbcdt and every group allow to read at once."""
        return plgpu.Layout.WG_STRIDED((width,), vec_size=math.gcd(4, width // THREADS, sizes.projected, sizes.inner))

    @pl.when(part == 0)
    def _():
        width = sizes.inner // sizes.groups
        layout = strided(width)
        channels = pl.ds(group * width, width)
        y = load32(refs["y"].at[batch, channels], layout)
        gate = silu(load32(zxbcdt.at[batch, channels], layout))
        if "norm_weight" not in refs:
            y = y * gate
        else:
            weight = load32(refs["norm_weight"].at[channels], layout)
            if not norm_before_gate:
                y = y * gate
            y = y * lax.rsqrt(jnp.sum(y * y) * (1.0 / width) + eps) * weight
            if norm_before_gate:
                y = y * gate
        out.at[batch, channels][...] = y.astype(out.dtype)

    @pl.when(part > 0)
    def _():
        width = sizes.channels // sizes.groups // _movers(sizes)  # a share of the channels; which, is all the same
        layout = strided(width)
        first = (group * _movers(sizes) + part - 1) * width
        taps = conv_state.shape[-2]
        window = [conv_state.at[(*_layer(refs), batch, tap, pl.ds(first, width))] for tap in range(taps)]
        rows = [*window, zxbcdt.at[batch, pl.ds(sizes.inner + first, width)]]
        before, *later = (load(ref, layout, device_memory=True) for ref in rows)
        for ref, value in zip(window, later, strict=True):
            ref[...] = jnp.where(refs["active"][batch] > 0, value, before) if "active" in refs else value
            before = value


def _layer(refs) -> tuple:
    """What stands before the other indices of a state."""
    return (refs["layer"][0],) if "layer" in refs else ()


def _movers(sizes: Sizes) -> int:
    """Blocks for each group that move the convolution state: as many as divide its channels, at most 4."""
    return max(n for n in range(1, 5) if sizes.channels // sizes.groups // THREADS % n == 0)


def _one_each(width: int):
    """A vector over the threads, one number each; one shorter than the block is held several times."""
    warps = math.gcd(width // 32, 4)
    tiling = plgpu.Tiling(((32 * warps,), (32,), (1,)))
    held = (plgpu.Replicated(4 // warps), -3) if warps < 4 else (-3,)
    return plgpu.Layout.TILED(tiling, warp_dims=held, lane_dims=(-2,), vector_dim=-1)
