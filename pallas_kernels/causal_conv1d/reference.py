"""Causal depthwise convolution, one token at a time: the oracle of every other backend.

The state is the window of the last w - 1 inputs. Computed in float32, or in float64 when x is float64.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.segments import number_segments


def causal_conv1d(
    x, weight, bias=None, *, activation=None, initial_state=None, segment_ids=None, return_final_state=False
):
    batch, length, channels = x.shape
    width = weight.shape[1]
    window = jnp.zeros((batch, width - 1, channels), x.dtype) if initial_state is None else initial_state
    if segment_ids is None:
        segment_ids = jnp.zeros((batch, length), jnp.int32)
    segments = number_segments(segment_ids)
    starts = jnp.diff(segments.index, axis=1, prepend=0) > 0

    def token(carry, inputs):
        window, final = carry
        x_t, starts_t, real_t = inputs
        window = jnp.where(starts_t[:, None, None], 0, window)
        x_t = jnp.where(real_t[:, None], x_t, 0)
        y_t, window = causal_conv1d_step(window, x_t, weight, bias, activation=activation)
        final = jnp.where(real_t[:, None, None], window, final)  # the window at the last real token
        return (window, final), jnp.where(real_t[:, None], y_t, 0)

    by_token = (jnp.moveaxis(x, 1, 0), jnp.moveaxis(starts, 1, 0), jnp.moveaxis(segments.real, 1, 0))
    (_, final), y = lax.scan(token, (window, window), by_token)
    y = jnp.moveaxis(y, 0, 1)
    return (y, final) if return_final_state else y


def causal_conv1d_step(state, x, weight, bias=None, *, activation=None):
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    window = jnp.concatenate([state, x[:, None].astype(state.dtype)], axis=1)  # [b w c]
    y = jnp.sum(window.astype(dtype) * weight.T[None].astype(dtype), axis=1)
    if bias is not None:
        y = y + bias[None].astype(dtype)
    if activation == "silu":
        y = jax.nn.silu(y)
    return y.astype(x.dtype), window[:, 1:]
