"""SSD on TPUs in Pallas (Mosaic TPU), forward and backward: which arguments the kernels take, and `ssd` itself."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.segments import number_segments
from pallas_kernels.ssd.discretize import discretize
from pallas_kernels.ssd.pallas_tpu.backward import gradients
from pallas_kernels.ssd.pallas_tpu.forward import walk
from pallas_kernels.ssd.pallas_tpu.layout import make_layout
from pallas_kernels.ssd.visibility import first_visible_tokens


def why_not_here() -> str | None:
    """Why this backend cannot be the automatic choice on the default device."""
    platform = jax.devices()[0].platform
    return None if platform == "tpu" else f"needs a TPU, the default device is a {platform}"


def why_not_ssd(x, dt, A, B, C, *, chunk_size=None, precision=None, **_) -> str | None:
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        return f"x is {x.dtype}; the kernel multiplies float32 or bfloat16"
    if not x.dtype == B.dtype == C.dtype:
        return f"x, B and C are {x.dtype}, {B.dtype} and {C.dtype}; the kernel multiplies operands of one dtype"
    if not isinstance(precision, (str, lax.Precision, type(None))):
        return f"precision is {precision}; the kernel takes one jax.lax.Precision for all products"
    if make_layout(x, B, chunk_size) is None:
        heads, head_dim = x.shape[2] // B.shape[2], x.shape[3]
        return f"a group of {heads} heads, {head_dim} wide, with states of {B.shape[-1]} does not fit into VMEM"
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
    layout = make_layout(x, B, chunk_size)
    precision = _precision_of_products(x.dtype, precision)
    wanted = ("y", "final") if return_final_state else ("y",)

    def lay_out(arrays):
        """The operands of the kernels; `a` are the increments dt A, and `first_visible` comes apart."""
        segments = None
        if "segment_ids" in arrays:
            segments = number_segments(arrays["segment_ids"])
        steps = discretize(arrays["dt"], arrays.get("dt_bias"), dt_softplus, dt_limit, jnp.float32)
        if segments is not None:
            steps = jnp.where(segments.real[..., None], steps, 0)
        operands = {
            "x": layout.in_lanes(arrays["x"]),
            "B": layout.grouped(arrays["B"]),
            "C": layout.grouped(arrays["C"]),
            "dt": layout.in_rows(steps),
            "a": layout.in_rows(steps * arrays["A"].astype(jnp.float32)[None, None]),
        }
        if "z" in arrays:
            operands["z"] = layout.in_lanes(arrays["z"])
        if "D" in arrays:
            operands["D"] = layout.skip_in_lanes(arrays["D"])
        if "initial_state" in arrays:
            operands["state"] = layout.state_in_lanes(arrays["initial_state"])
        if segments is None:
            return operands, {}
        visible = first_visible_tokens(segments, layout.chunks, layout.chunk)
        return operands, {"first_visible": visible[:, :, None]}

    def summed(operands):
        """With the sums s of the increments in each chunk, from which decays are computed, in their place."""
        operands = dict(operands)
        return operands | {"s": jnp.cumsum(operands.pop("a"), axis=-1)}

    @jax.custom_vjp
    def run(arrays):
        operands, others = lay_out(arrays)
        results = walk(summed(operands) | others, layout, precision, wanted)
        y = layout.from_lanes(results["y"])
        return (y, layout.state_from_lanes(results["final"])) if return_final_state else y

    def backward(arrays, cotangents):
        """Keeps nothing but the arguments."""
        dy, dfinal = cotangents if return_final_state else (cotangents, None)
        operands, pull_back, others = jax.vjp(lay_out, arrays, has_aux=True)
        dfinal = None if dfinal is None else layout.state_in_lanes(dfinal)
        return pull_back(gradients(summed(operands) | others, layout, precision, layout.in_lanes(dy), dfinal))

    run.defvjp(lambda arrays: (run(arrays), arrays), backward)
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
    return run({name: a for name, a in arrays.items() if a is not None})


def _precision_of_products(dtype, precision) -> lax.Precision:
    """Products of bfloat16 are exact as they are. float32 means float32, unless less was asked for."""
    if dtype == jnp.bfloat16:
        return lax.Precision.DEFAULT
    if precision is not None and lax.Precision(precision) == lax.Precision.DEFAULT:
        return lax.Precision.DEFAULT
    return lax.Precision.HIGHEST  # also for HIGH, which Mosaic does not know
