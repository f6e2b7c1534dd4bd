"""The SSD recurrence, one token at a time: the oracle of every other backend.

Mamba-2 (arXiv 2405.21060, section 3.1, with the scalar decay of section 5), for each head:

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T        state [p n]
    y_t = h_t C_t + D x_t

Computed in float32, or in float64 when x is float64.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.segments import number_segments


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
    del chunk_size, precision  # a recurrence has neither
    batch, length, heads, head_dim = x.shape
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    state = jnp.zeros((batch, heads, head_dim, B.shape[-1]), dtype)
    if initial_state is not None:
        state = initial_state.astype(dtype)
    if segment_ids is None:
        segment_ids = jnp.zeros((batch, length), jnp.int32)
    segments = number_segments(segment_ids)
    starts = jnp.diff(segments.index, axis=1, prepend=0) > 0

    def token(state, inputs):
        x_t, z_t, dt_t, B_t, C_t, starts_t, real_t = inputs
        state = jnp.where(starts_t[:, None, None, None], 0, state)
        y_t, next_state = ssd_step(
            state, x_t, dt_t, A, B_t, C_t, D=D, z=z_t, dt_bias=dt_bias, dt_softplus=dt_softplus, dt_limit=dt_limit
        )
        next_state = jnp.where(real_t[:, None, None, None], next_state, state)
        return next_state, jnp.where(real_t[:, None, None], y_t, 0)

    by_token = (jnp.moveaxis(a, 1, 0) if a is not None else None for a in (x, z, dt, B, C, starts, segments.real))
    state, y = lax.scan(token, state, tuple(by_token))
    y = jnp.moveaxis(y, 0, 1)
    return (y, state) if return_final_state else y


def ssd_step(state, x, dt, A, B, C, *, D=None, z=None, dt_bias=None, dt_softplus=False, dt_limit=(0.0, float("inf"))):
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    out_dtype, state_dtype, heads_per_group = x.dtype, state.dtype, x.shape[1] // B.shape[1]
    x, dt, A, B, C, state = (a.astype(dtype) for a in (x, dt, A, B, C, state))
    B, C = (jnp.repeat(a, heads_per_group, axis=1) for a in (B, C))  # [b h n]

    if dt_bias is not None:
        dt = dt + dt_bias[None]
    if dt_softplus:
        dt = jax.nn.softplus(dt)
    low, high = dt_limit
    dt = jnp.where(dt < low, low, jnp.where(dt > high, high, dt))

    decay = jnp.exp(dt * A[None])
    written = dt[..., None, None] * x[..., :, None] * B[..., None, :]
    state = decay[..., None, None] * state + written
    y = jnp.sum(state * C[..., None, :], axis=-1)
    if D is not None:
        y = y + D.reshape(1, x.shape[1], -1).astype(dtype) * x
    if z is not None:
        y = y * jax.nn.silu(z.astype(dtype))
    return y.astype(out_dtype), state.astype(state_dtype)
