"""SSD of a sequence in pieces, one on each device: what enters a piece is found first, then every device runs its own.

A piece acts on the state that enters it as S' = decay S + W, with one number `decay` for each head and with W [p n],
what its own tokens write. One matrix product gives W, about a quarter of the work of the scan. All pieces' W and decay
are gathered on every device, which runs the short recurrence over the pieces for itself: so each device knows the state
that enters its piece and the one after the last. Then the scan runs once, with any backend, from the right state.

Gathering moves one state [b h p n] for each piece and holds them all, whatever the length. Passing the state from
device to device would hold one, but let each device wait for all before it. To scan from zero and correct y afterwards
would add to numbers that are rounded and gated already.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.segments import find_ends, number_segments
from pallas_kernels.ssd.discretize import discretize


def ssd(
    run: Callable,
    axis: tuple[str, ...],
    *,
    initial_state=None,
    segment_ids=None,
    return_final_state,
    **arguments,
):
    """`run`, which is `ssd` for one device, on this device's piece of the tokens along the mesh axes `axis`.

    `initial_state` is the one before the first piece; the final state is that after the last, on every device.
    """
    x, B = arguments["x"], arguments["B"]
    batch, _, heads, head_dim = x.shape
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    state = jnp.zeros((batch, heads, head_dim, B.shape[-1]), dtype)
    if initial_state is not None:
        state = initial_state.astype(dtype)
    segments = ends = None
    if segment_ids is not None:
        segments = number_segments(segment_ids)
        ends = find_ends(segment_ids, segments)

    def piece(carry, inputs):
        """The state that enters a piece and the last id before it -> the same after it, and what enters."""
        state, last = carry
        written, decay, ends = inputs
        if ends is not None:
            begins = (last >= 0) & (ends.first >= 0) & (ends.first != last)  # with a sequence of its own
            last = jnp.where(ends.last >= 0, ends.last, last)
            state = jnp.where(begins[:, None, None, None], 0, state)
            decay = jnp.where(ends.unbroken[:, None], decay, 0)
        return (decay[..., None, None] * state + written, last), state

    written, decay = _act(arguments, segments, dtype)
    pieces = lax.all_gather((written, decay, ends), axis)
    (final, _), entering = lax.scan(
        piece, (state, None if ends is None else jnp.full(batch, -1, ends.last.dtype)), pieces
    )
    y = run(
        **arguments, initial_state=entering[lax.axis_index(axis)], segment_ids=segment_ids, return_final_state=False
    )
    return (y, final) if return_final_state else y


def _act(arguments: dict, segments, dtype):
    """What the tokens of a piece write into a state [b h p n], and by how much they let it decay [b h].

    In the backward pass it is computed again from the arguments.
    """

    @jax.checkpoint
    def act(x, dt, A, B, dt_bias, segments):
        batch, length, heads, head_dim = x.shape
        groups = B.shape[2]
        dt = discretize(dt, dt_bias, arguments["dt_softplus"], arguments["dt_limit"], dtype)
        if segments is not None:
            dt = jnp.where(segments.real[..., None], dt, 0)
        to_end = lax.cumsum(dt * A.astype(dtype)[None, None], axis=1, reverse=True)  # summed where it is small
        decay = jnp.exp(to_end[:, 0])
        to_end = jnp.pad(to_end[:, 1:], ((0, 0), (0, 1), (0, 0)))
        if segments is not None:
            to_end = jnp.where((segments.index == segments.index[:, -1:])[..., None], to_end, -jnp.inf)
        written = (x * (dt * jnp.exp(to_end))[..., None]).astype(x.dtype)
        precision = arguments["precision"]
        if precision is None and x.dtype == jnp.float32:
            precision = lax.Precision.HIGHEST
        written = jnp.einsum(
            "blgrp,blgn->bgrpn",
            written.reshape(batch, length, groups, heads // groups, head_dim),
            B,
            precision=precision,
            preferred_element_type=dtype,
        )
        return written.reshape(batch, heads, head_dim, -1), decay

    names = ("x", "dt", "A", "B", "dt_bias")
    return act(*(arguments[name] for name in names), segments)
