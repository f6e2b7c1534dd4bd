"""Gated RMS norm for XLA, which fuses it into a reduction and one pass."""

import jax
import jax.numpy as jnp
from jax import lax


def gated_rms_norm(x, z, weight, *, eps, group_size=None, norm_before_gate=False):
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    gate = jax.nn.silu(z.astype(dtype))
    y = x.astype(dtype) if norm_before_gate else x.astype(dtype) * gate
    grouped = y.reshape(*y.shape[:-1], -1, group_size or y.shape[-1])
    scale = lax.rsqrt(jnp.mean(jnp.square(grouped), axis=-1, keepdims=True) + eps)
    y = (grouped * scale).reshape(y.shape) * weight.astype(dtype)[(None,) * (y.ndim - 1)]
    if norm_before_gate:
        y *= gate
    return y.astype(x.dtype)
