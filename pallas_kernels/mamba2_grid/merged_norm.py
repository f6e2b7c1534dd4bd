"""The gated norm of several directions and their merge on Hopper, forward and backward one pass each (Pallas, Mosaic GPU).

    out = share * sum over k of rms_norm(y_k * silu(z)) * weight        share = 1/k for the mean, 1 for the sum

A thread block takes some patches and one group of channels, as in `gated_rms_norm`, and reads y of each direction where
it lies for its walks (`visual_scan.walked`). So y of every direction is read once, z once, and one result is written.
Backward, dy of each direction is written where its walks lie, ready for the scan.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.gated_rms_norm.pallas_gpu import BLOCKS, BLOCKS_BACKWARD, Plan
from pallas_kernels.hopper import launch, load, load32, sigmoid
from pallas_kernels.walks import Walks


def normalize_and_merge(*, ys, z, weight, walks: Sequence[Walks], length, share, eps, width, norm_before_gate):
    """[b*l c] of one y [k*b*l c] for each of `walks`, z [b*l e] whose first c channels count, and weight [c].

    Groups are a multiple of 128 channels wide: `width`.
    """
    rows, channels = z.shape[0], weight.shape[0]
    plan = Plan(rows, channels, width, z.shape[1], BLOCKS)
    return launch(
        functools.partial(_forward, plan, walks, length, share, eps, norm_before_gate),
        "gated_rms_norm_merged",
        jax.ShapeDtypeStruct((rows, channels), z.dtype),
        grid=plan.grid,
        approximately=True,
    )(*ys, z, weight)


def normalize_and_merge_backward(
    *, ys, z, weight, dout, walks: Sequence[Walks], length, share, eps, width, norm_before_gate
):
    """(one dy [k*b*l c] for each of `walks`, dz [b*l c], sums [blocks c] float32: in parts the gradient of weight)."""
    rows, channels = dout.shape
    plan = Plan(rows, channels, width, z.shape[1], BLOCKS_BACKWARD)
    *dys, dz, sums = launch(
        functools.partial(_backward, plan, walks, length, share, eps, norm_before_gate),
        "gated_rms_norm_merged_gradient",
        (
            *(jax.ShapeDtypeStruct(y.shape, y.dtype) for y in ys),
            jax.ShapeDtypeStruct(dout.shape, z.dtype),
            jax.ShapeDtypeStruct((plan.blocks, channels), jnp.float32),
        ),
        grid=plan.grid,
        approximately=True,
    )(*ys, z, weight, dout)
    return dys, dz, sums


def _places(plan, walks, length, refs, row):
    """Where y of each direction lies for the patch of a row."""
    token = lax.rem(row, length)
    for of, ref in zip(walks, refs, strict=True):
        place = row - token + of.from_grid(token)
        for walk in range(of.number):
            yield ref.at[walk * plan.rows + place, plan.channels]


def _forward(plan, walks, length, share, eps, norm_before_gate, *refs):
    *y_refs, z_ref, weight_ref, out_ref = refs
    weight = load32(weight_ref.at[plan.channels], plan.layout)

    def step(row, _):
        # All loads are issued before the first of them is used.
        ys = [load(ref, plan.layout, device_memory=True) for ref in _places(plan, walks, length, y_refs, row)]
        z = load32(z_ref.at[row, plan.channels], plan.layout)
        gate = z * sigmoid(z)
        total = plan.zeros()
        for y in ys:
            y = y.astype(jnp.float32)
            a = y if norm_before_gate else y * gate
            total = total + a * lax.rsqrt(plan.mean(a * a) + eps)
        out = share * total * weight
        out_ref.at[row, plan.channels][...] = (out * gate if norm_before_gate else out).astype(out_ref.dtype)
        return 0

    plan.loop(step, 0)


def _backward(plan, walks, length, share, eps, norm_before_gate, *refs):
    """As the gradient in `gated_rms_norm`, with the sum over the directions in dz and in the gradient of the weight."""
    k = len(walks)
    y_refs, (z_ref, weight_ref, dout_ref), dy_refs, (dz_ref, sums_ref) = (
        *(refs[:k], refs[k : k + 3], refs[k + 3 : 2 * k + 3], refs[2 * k + 3 :]),
    )

    def step(row, total):
        dz = plan.zeros()
        places = (_places(plan, walks, length, of, row) for of in (y_refs, dy_refs))
        for y_ref, dy_ref in zip(*places, strict=True):
            # What all directions need is loaded again for each, from the cache: registers are few.
            y, z, dout = (
                load32(ref, plan.layout)
                for ref in (y_ref, z_ref.at[row, plan.channels], dout_ref.at[row, plan.channels])
            )
            weight = load32(weight_ref.at[plan.channels], plan.layout)
            half = sigmoid(z)
            gate = z * half
            slope = half * (1.0 + z * (1.0 - half))  # of the gate
            a = y if norm_before_gate else y * gate
            scale = lax.rsqrt(plan.mean(a * a) + eps)
            n = a * scale
            dout = share * dout
            of_gate = dout * n
            if norm_before_gate:
                dout = dout * gate
            total = total + dout * n
            dn = dout * weight
            da = scale * (dn - n * plan.mean(dn * n))
            if norm_before_gate:
                dy, dz = da, dz + of_gate * weight * slope
            else:
                dy, dz = da * gate, dz + da * y * slope
            dy_ref[...] = dy.astype(dy_ref.dtype)
        dz_ref.at[row, plan.channels][...] = dz.astype(dz_ref.dtype)
        return total

    sums_ref.at[lax.axis_index("rows"), plan.channels][...] = plan.loop(step, plan.zeros())
