"""Causal convolution of a sequence in pieces, one on each device: the last inputs of a piece are sent to the next one."""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax

from pallas_kernels.segments import number_segments


def causal_conv1d(
    run: Callable,
    axis: tuple[str, ...],
    *,
    x,
    weight,
    initial_state=None,
    segment_ids=None,
    return_final_state,
    **arguments,
):
    """`run`, which is `causal_conv1d` for one device, on this device's piece of the tokens along the mesh axes `axis`.

    `initial_state` is the one before the first piece; the final state is that of the whole row, on every device.
    """
    batch, length, channels = x.shape
    reach = weight.shape[1] - 1
    pieces, here = lax.axis_size(axis), lax.axis_index(axis)
    if length < reach:
        raise ValueError(
            f"use_mesh: got pieces of {length} tokens, expected at least the {reach} that a convolution of width "
            f"{reach + 1} looks back; choose fewer pieces"
        )

    def from_the_left(a):
        return lax.ppermute(a[:, length - reach :], axis, [(i, i + 1) for i in range(pieces - 1)])

    before = jnp.zeros((batch, reach, channels), x.dtype) if initial_state is None else initial_state
    if not reach:  # nothing to send
        y = run(x=x, weight=weight, segment_ids=segment_ids, return_final_state=False, **arguments)
        return (y, before) if return_final_state else y
    halo = from_the_left(x)
    last_piece = pieces - 1
    if segment_ids is not None:
        halo_ids = from_the_left(segment_ids)
        index, real = number_segments(jnp.concatenate([halo_ids, segment_ids], axis=1))
        first_real = reach + jnp.argmax(real[:, reach:], axis=1)
        visible = real & (index == jnp.take_along_axis(index, first_real[:, None], axis=1))
        halo = jnp.where(visible[:, :reach, None], halo, 0)
        has_real = jnp.any(segment_ids >= 0, axis=1)
        last_piece = lax.pmax(jnp.where(has_real, here, 0), axis)[:, None, None]  # that with the row's last real token
    halo = jnp.where(here == 0, before.astype(x.dtype), halo)
    outputs = run(
        x=x,
        weight=weight,
        initial_state=halo,
        segment_ids=segment_ids,
        return_final_state=return_final_state,
        **arguments,
    )
    if not return_final_state:
        return outputs
    y, final = outputs
    final = lax.psum(jnp.where(here == last_piece, final, 0), axis)
    return y, final.astype(before.dtype)
