"""Causal depthwise convolution as a sum of shifted copies: XLA fuses it into one pass over x."""

import jax
import jax.numpy as jnp

from pallas_kernels.causal_conv1d import reference
from pallas_kernels.segments import number_segments


def causal_conv1d(
    x, weight, bias=None, *, activation=None, initial_state=None, segment_ids=None, return_final_state=False
):
    batch, length, channels = x.shape
    width = weight.shape[1]
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    if initial_state is None:
        initial_state = jnp.zeros((batch, width - 1, channels), x.dtype)
    segments = None
    if segment_ids is not None:
        segments = number_segments(segment_ids)
        x = jnp.where(segments.real[..., None], x, 0)
        # The window before the row belongs to its first sequence, number 0.
        index = jnp.pad(segments.index, ((0, 0), (width - 1, 0)))
    extended = jnp.concatenate([initial_state.astype(x.dtype), x], axis=1)  # [b w-1+l c]

    y = jnp.zeros((1, 1, channels), dtype) if bias is None else bias.astype(dtype)[None, None]
    for tap in range(width):
        taken = extended[:, tap : tap + length].astype(dtype)
        if segments is not None:
            same = index[:, tap : tap + length] == segments.index
            taken = jnp.where(same[..., None], taken, 0)
        y = y + taken * weight[:, tap].astype(dtype)[None, None]
    if activation == "silu":
        y = jax.nn.silu(y)
    y = y.astype(x.dtype)

    if segments is not None:
        y = jnp.where(segments.real[..., None], y, 0)
    return (y, final_state(x, initial_state, segments)) if return_final_state else y


def final_state(x, initial_state, segments):
    """The last w - 1 inputs up to the last real token of each row, [b w-1 c]; `segments` those of `number_segments`."""
    length, width = x.shape[1], initial_state.shape[1] + 1
    if segments is not None:
        x = jnp.where(segments.real[..., None], x, 0)
    extended = jnp.concatenate([initial_state.astype(x.dtype), x], axis=1)
    if segments is None:
        final = extended[:, length:]
    else:
        index = jnp.pad(segments.index, ((0, 0), (width - 1, 0)))
        last_real = jnp.max(jnp.where(segments.real, jnp.arange(length)[None], -1), axis=1)
        window = last_real[:, None] + 1 + jnp.arange(width - 1)[None]  # positions in `extended`, [b w-1]
        final = jnp.take_along_axis(extended, window[..., None], axis=1)
        same = jnp.take_along_axis(index, window, axis=1) == segments.index[:, -1:]
        final = jnp.where(same[..., None], final, 0)
    return final.astype(initial_state.dtype)


causal_conv1d_step = reference.causal_conv1d_step  # one token has only one form
