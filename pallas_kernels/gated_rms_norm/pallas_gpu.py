"""Gated RMS norm on Hopper, forward and backward one pass each (Pallas, Mosaic GPU).

A thread block takes some rows of one group of channels, one row after the other, whole in its registers: every input is
read once. The gradient of the weight is summed over the rows of a block in registers, and over blocks by XLA in a fixed
order.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gradients import with_gradient
from pallas_kernels.hopper import FLOATS, PROCESSORS, launch, load32, sigmoid, why_not_here  # noqa: F401, part of a backend

THREADS = 128  # of a block
WIDEST_GROUP = 64 * THREADS  # channels: a thread keeps several vectors of them in its registers
BLOCKS = 8 * PROCESSORS
BLOCKS_BACKWARD = 4 * PROCESSORS  # each writes its part of the gradient of the weight


def why_not_gated_rms_norm(x, z, weight, *, group_size=None, **_) -> str | None:
    for a in (x, z, weight):
        if a.dtype not in FLOATS:
            return f"an argument is {a.dtype}; the kernel takes float32, bfloat16 and float16"
    width = group_size or x.shape[-1]
    if width > WIDEST_GROUP:
        return f"a group has {width} channels; the kernel keeps at most {WIDEST_GROUP} in registers"
    return None


def gated_rms_norm(x, z, weight, *, eps, group_size=None, norm_before_gate=False):
    width = group_size or x.shape[-1]
    options = {"eps": eps, "width": width, "norm_before_gate": norm_before_gate}
    filled = width + -width % THREADS

    def by_group(a):
        """[.. c] -> [rows c'], zeros behind the channels of each group up to a multiple of `THREADS`."""
        if filled == width:
            return a.reshape(-1, a.shape[-1])
        a = a.reshape(-1, a.shape[-1] // width, width)
        return jnp.pad(a, ((0, 0), (0, 0), (0, filled - width))).reshape(a.shape[0], -1)

    def back(a, like):
        return a.reshape(-1, like.shape[-1] // width, filled)[..., :width].reshape(like.shape).astype(like.dtype)

    def forward(arrays):
        filled_arrays = {name: by_group(a) for name, a in arrays.items()}
        filled_arrays["weight"] = filled_arrays["weight"][0]
        return back(normalize(**filled_arrays, **options), arrays["x"])

    def backward(arrays, dy):
        filled_arrays = {name: by_group(a) for name, a in (arrays | {"dy": dy}).items()}
        filled_arrays["weight"] = filled_arrays["weight"][0]
        dx, dz, sums = normalize_backward(**filled_arrays, **options)
        gradients = {"x": dx, "z": dz, "weight": sums.sum(axis=0)}
        return {name: back(a, arrays[name]) for name, a in gradients.items()}

    return with_gradient(forward, backward)({"x": x, "z": z, "weight": weight})


# The kernels.


def normalize(*, x, z, weight, eps, width, norm_before_gate):
    """[rows c] of x [rows c], z [rows e] whose first c channels count, and weight [c].

    Groups are a multiple of `THREADS` wide, `width` of it channels and the rest zeros.
    """
    rows, channels = x.shape
    plan = Plan(rows, channels, width, z.shape[1], BLOCKS)
    return launch(
        functools.partial(_forward, plan, eps, norm_before_gate),
        "gated_rms_norm",
        jax.ShapeDtypeStruct(x.shape, x.dtype),
        grid=plan.grid,
        approximately=True,
    )(x, z, weight)


def normalize_backward(*, x, z, weight, dy, eps, width, norm_before_gate, row_of_dz=None):
    """(dx, dz [rows c], sums [blocks c] float32: in parts the gradient of weight); arguments as of `normalize`.

    With `row_of_dz` dz is [rows row_of_dz]; only its first c channels are written.
    """
    rows, channels = x.shape
    plan = Plan(rows, channels, width, z.shape[1], BLOCKS_BACKWARD)
    return launch(
        functools.partial(_backward, plan, eps, norm_before_gate),
        "gated_rms_norm_gradient",
        (
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            jax.ShapeDtypeStruct((rows, row_of_dz or channels), z.dtype),
            jax.ShapeDtypeStruct((plan.blocks, channels), jnp.float32),
        ),
        grid=plan.grid,
        approximately=True,
    )(x, z, weight, dy)


class Plan:
    """Which rows and channels a thread block takes."""

    def __init__(self, rows: int, channels: int, width: int, row_of_z: int, most_blocks: int):
        self.rows, self.width = rows, width
        self.filled = width + -width % THREADS
        self.groups = channels // self.filled
        self.rows_each = -(-rows // max(1, most_blocks // self.groups))
        self.blocks = -(-rows // self.rows_each)
        self.grid = {"rows": self.blocks, "group": self.groups}
        neighbours = math.gcd(8, self.filled // THREADS, row_of_z, channels)
        self.layout = plgpu.Layout.WG_STRIDED((self.filled,), vec_size=neighbours)

    @property
    def channels(self):
        """Of this block."""
        return pl.ds(lax.axis_index("group") * self.filled, self.filled)

    def loop(self, body, carry):
        """`body(row, carry)` for the rows of this block."""
        first = lax.axis_index("rows") * self.rows_each
        return lax.fori_loop(first, jnp.minimum(first + self.rows_each, self.rows), body, carry)

    def mean(self, a):
        return jnp.sum(a) * (1.0 / self.width)

    def zeros(self):
        return plgpu.layout_cast(jnp.zeros(self.filled, jnp.float32), self.layout)


def _forward(plan, eps, norm_before_gate, x_ref, z_ref, weight_ref, y_ref):
    channels = plan.channels
    weight = load32(weight_ref.at[channels], plan.layout)

    def step(row, _):
        x, z = (load32(ref.at[row, channels], plan.layout) for ref in (x_ref, z_ref))
        gate = z * sigmoid(z)
        a = x if norm_before_gate else x * gate
        y = a * lax.rsqrt(plan.mean(a * a) + eps) * weight
        y_ref.at[row, channels][...] = (y * gate if norm_before_gate else y).astype(y_ref.dtype)
        return 0

    plan.loop(step, 0)


def _backward(plan, eps, norm_before_gate, x_ref, z_ref, weight_ref, dy_ref, dx_ref, dz_ref, sums_ref):
    """With a the input of the norm, s its scale, and n = a s: da = s (dn - n mean(dn n))."""
    channels = plan.channels

    def step(row, total):
        x, z, dy = (load32(ref.at[row, channels], plan.layout) for ref in (x_ref, z_ref, dy_ref))
        half = sigmoid(z)
        gate = z * half
        slope = half * (1.0 + z * (1.0 - half))  # of the gate
        a = x if norm_before_gate else x * gate
        scale = lax.rsqrt(plan.mean(a * a) + eps)
        n = a * scale
        if norm_before_gate:
            dy_gate, dy = dy * n, dy * gate
        total = total + dy * n
        weight = load32(weight_ref.at[channels], plan.layout)  # from the cache: registers are few
        dn = dy * weight
        da = scale * (dn - n * plan.mean(dn * n))
        if norm_before_gate:
            dx, dz = da, dy_gate * weight * slope
        else:
            dx, dz = da * gate, da * x * slope
        for ref, value in ((dx_ref, dx), (dz_ref, dz)):
            ref.at[row, channels][...] = value.astype(ref.dtype)
        return total

    sums_ref.at[lax.axis_index("rows"), channels][...] = plan.loop(step, plan.zeros())
