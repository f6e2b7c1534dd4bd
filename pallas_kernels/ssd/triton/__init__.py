"""SSD in Triton by jax-triton, for NVIDIA GPUs from Ampere on: which arguments the kernels take, and `ssd` itself."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.gradients import with_gradient
from pallas_kernels.sharded import on_one_device
from pallas_kernels.ssd.triton.backward import gradients
from pallas_kernels.ssd.triton.forward import outputs
from pallas_kernels.ssd.triton.launch import why_not_importable
from pallas_kernels.ssd.triton.plan import (
    LARGEST_FLOAT32_STATE,
    WIDEST_HEAD,
    WIDEST_STATE,
    filled,
    is_one_precision,
    make_plan,
)


def why_not_here() -> str | None:
    """Why this backend cannot be the automatic choice on the default device."""
    device = jax.devices()[0]
    if device.platform != "gpu":
        return f"needs a CUDA device of compute capability 8.0 or later, the default device is a {device.platform}"
    capability = str(getattr(device, "compute_capability", "unknown"))
    major = capability.split(".")[0]
    if not major.isdigit() or int(major) < 8:
        return f"needs a CUDA device of compute capability 8.0 or later, {device.device_kind} has {capability}"
    if len(jax.devices()) > 1 and not on_one_device():
        return "several devices: XLA cannot split the kernel over a mesh by itself; call it inside use_mesh"
    return why_not_importable()


def why_not_ssd(x, dt, A, B, C, *, precision=None, **_) -> str | None:
    head_dim, state_size = x.shape[-1], B.shape[-1]
    if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        return f"x is {x.dtype}; the kernel multiplies float32, bfloat16 or float16"
    if not x.dtype == B.dtype == C.dtype:
        return f"x, B and C are {x.dtype}, {B.dtype} and {C.dtype}; the kernel multiplies operands of one dtype"
    if head_dim > WIDEST_HEAD:
        return f"heads are {head_dim} wide; the kernel takes up to {WIDEST_HEAD}"
    if state_size > WIDEST_STATE:
        return f"the state size is {state_size}; the kernel takes up to {WIDEST_STATE}"
    if x.dtype == jnp.float32 and filled(head_dim) * filled(state_size) > LARGEST_FLOAT32_STATE:
        return f"float32 heads {head_dim} wide with states of {state_size} do not fit into shared memory"
    if not is_one_precision(precision):
        return f"precision is {precision}; the kernel takes one jax.lax.Precision for all products"
    return why_not_importable()


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
    del chunk_size  # the plan has its own
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
    options = {
        "plan": make_plan(x, B, precision),
        "dt_softplus": dt_softplus,
        "dt_limit": dt_limit,
        "return_final_state": return_final_state,
    }
    run = with_gradient(functools.partial(outputs, **options), functools.partial(gradients, **options))
    return run({name: a for name, a in arrays.items() if a is not None})
