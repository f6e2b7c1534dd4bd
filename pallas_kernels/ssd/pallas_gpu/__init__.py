"""SSD on NVIDIA Hopper in Pallas' Mosaic GPU: which arguments the kernels take, `ssd` and `ssd_step` themselves."""

import functools

import jax.numpy as jnp

from pallas_kernels.gradients import with_gradient, with_gradient_of
from pallas_kernels.hopper import why_not_here  # noqa: F401, part of a backend
from pallas_kernels.ssd import xla
from pallas_kernels.ssd.pallas_gpu import backward, forward, step


def why_not_ssd(x, dt, A, B, C, *, dt_limit=(0.0, float("inf")), **_) -> str | None:
    head_dim, state_size = x.shape[-1], B.shape[-1]
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        return f"x is {x.dtype}; the kernel multiplies bfloat16 or float16"
    if not x.dtype == B.dtype == C.dtype:
        return f"x, B and C are {x.dtype}, {B.dtype} and {C.dtype}; the kernel multiplies operands of one dtype"
    if head_dim > 64 and head_dim % 64:
        return f"heads are {head_dim} wide; the kernel takes up to 64, or a multiple of 64"
    if state_size > 256:
        return f"the state size is {state_size}; the kernel keeps at most 256 in registers"
    if dt_limit[0] < 0:
        return f"dt_limit starts at {dt_limit[0]}; the kernel takes logarithms of the step sizes"
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
    del chunk_size, precision  # tiles are 64 tokens, products are exact for 16-bit operands and summed in float32
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
    options = {"dt_softplus": dt_softplus, "dt_limit": dt_limit, "return_final_state": return_final_state}
    arrays = {name: a for name, a in arrays.items() if a is not None}

    def run(arrays):
        return forward.outputs(**arrays, **options)

    if B.shape[-1] > backward.WIDEST_STATE:
        return with_gradient_of(lambda arrays: xla.ssd(**arrays, **options), run)(arrays)
    return with_gradient(run, functools.partial(backward.gradients, **options))(arrays)


def why_not_ssd_step(state, x, dt, A, B, C, *, D=None, z=None, dt_bias=None, **_) -> str | None:
    return step.why_not(state, x, dt, A, B, C, D, z, dt_bias)


def ssd_step(state, x, dt, A, B, C, *, D=None, z=None, dt_bias=None, dt_softplus=False, dt_limit=(0.0, float("inf"))):
    arrays = {"state": state, "x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "z": z, "dt_bias": dt_bias}
    options = {"dt_softplus": dt_softplus, "dt_limit": dt_limit}
    run = with_gradient_of(
        lambda arrays: xla.ssd_step(**arrays, **options), lambda arrays: step.ssd_step(**arrays, **options)
    )
    return run(arrays)
