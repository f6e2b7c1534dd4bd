"""Gated RMS norm, written as its definition: the oracle of every other backend.

Computed in float32, or in float64 when x is float64.
"""

import jax
import jax.numpy as jnp


def gated_rms_norm(x, z, weight, *, eps, group_size=None, norm_before_gate=False):
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    width = x.shape[-1]
    group_size = group_size or width
    y, gate = x.astype(dtype), jax.nn.silu(z.astype(dtype))
    if not norm_before_gate:
        y = y * gate
    grouped = y.reshape(*y.shape[:-1], width // group_size, group_size)
    mean_square = jnp.sum(grouped**2, axis=-1, keepdims=True) / group_size
    y = (grouped / jnp.sqrt(mean_square + eps)).reshape(y.shape) * weight.astype(dtype)[(None,) * (y.ndim - 1)]
    if norm_before_gate:
        y = y * gate
    return y.astype(x.dtype)
