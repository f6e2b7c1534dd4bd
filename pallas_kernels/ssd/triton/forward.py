"""SSD in Triton: a walk leaves the state that enters each chunk, then all chunks are computed at once.

The mathematics are those of `xla`. XLA computes the step sizes d and, in each chunk, the running sums s of d A. The
kernels only take exponentials of s and of its differences where these are not positive, so nothing overflows.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.segments import number_segments
from pallas_kernels.ssd.discretize import discretize
from pallas_kernels.ssd.triton.launch import launch
from pallas_kernels.ssd.triton.plan import filled
from pallas_kernels.ssd.visibility import first_visible_tokens


def outputs(arrays, plan, precision, *, dt_softplus, dt_limit, return_final_state):
    """What `ssd` returns, for its arguments by name."""
    steps = step_sizes(arrays, dt_softplus, dt_limit)
    decays = prepare(steps, arrays, plan)
    states, final = chunk_states(
        arrays["x"], arrays["B"], decays, plan, precision, ends=arrays.get("initial_state"), reverse=False
    )
    y = chunk_outputs(arrays, decays, states, plan, precision)
    return (y, final) if return_final_state else y


def step_sizes(arrays, dt_softplus, dt_limit):
    """d [b l h] in float32, 0 on padding."""
    steps = discretize(arrays["dt"], arrays.get("dt_bias"), dt_softplus, dt_limit, jnp.float32)
    if "segment_ids" in arrays:
        steps = jnp.where(number_segments(arrays["segment_ids"]).real[..., None], steps, 0)
    return steps


def prepare(steps, arrays, plan):
    """What the kernels read about the tokens: s and d [b h chunks Q], first_visible [b chunks Q] or None."""
    d = plan.by_chunk(steps)
    # The running sum as a matrix product, which is one fast kernel; summed before A scales it.
    upper = jnp.triu(jnp.ones((plan.chunk, plan.chunk), jnp.float32))
    s = jnp.einsum("bhcj,ji->bhci", d, upper, precision=lax.Precision.HIGHEST)
    s *= arrays["A"].astype(jnp.float32)[None, :, None, None]
    visible = None
    if "segment_ids" in arrays:
        visible = first_visible_tokens(number_segments(arrays["segment_ids"]), plan.chunks, plan.chunk)
    return {"s": s, "d": d, "first_visible": visible}


def chunk_states(values, keys, decays, plan, precision, *, ends, reverse):
    """(the states [b chunks h p n] that enter the chunks in the dtype of x, the last one [b h p n] in float32).

    `reverse`: the gradients of the states that leave the chunks, from dy and C instead of x and B; the last one is that
    of the state that enters the first chunk. `ends` [b h p n]: what the walk starts from, zeros if None.
    """
    tile_p, tile_n = min(64, filled(plan.head_dim)), min(64, filled(plan.state_size))
    tiles = -(-plan.head_dim // tile_p) * -(-plan.state_size // tile_n)
    state = (plan.head_dim, plan.state_size)
    results = launch(
        "ssd_states",
        (tiles, plan.heads, plan.batch),
        {
            "values": values,
            "keys": keys,
            "s": decays["s"],
            "d": decays["d"],
            "first_visible": decays["first_visible"],
            "ends": None if ends is None else ends.astype(jnp.float32),
        },
        (plan.length, plan.chunks, plan.heads, plan.groups),
        {
            "states": jax.ShapeDtypeStruct((plan.batch, plan.chunks, plan.heads, *state), values.dtype),
            "last": jax.ShapeDtypeStruct((plan.batch, plan.heads, *state), jnp.float32),
        },
        warps=4,
        stages=3,
        P=plan.head_dim,
        N=plan.state_size,
        Q=plan.chunk,
        BP=tile_p,
        BN=tile_n,
        REVERSE=reverse,
        HAS_ENDS=ends is not None,
        PACKED=decays["first_visible"] is not None,
        PRECISION=precision,
    )
    return results["states"], results["last"]


def chunk_outputs(arrays, decays, states, plan, precision):
    """y [b l h p]"""
    x, D, z = arrays["x"], arrays.get("D"), arrays.get("z")
    results = launch(
        "ssd_outputs",
        (plan.chunks, plan.heads // plan.block_heads, plan.batch),
        {
            "x": x,
            "B": arrays["B"],
            "C": arrays["C"],
            "s": decays["s"],
            "d": decays["d"],
            "states": states,
            "D": None if D is None else by_channel(D, plan),
            "z": z,
            "first_visible": decays["first_visible"],
        },
        (plan.length, plan.chunks, plan.heads, plan.groups),
        {"y": jax.ShapeDtypeStruct(x.shape, x.dtype)},
        warps=4,
        stages=2,
        P=plan.head_dim,
        N=plan.state_size,
        Q=plan.chunk,
        BP=filled(plan.head_dim),
        BN=filled(plan.state_size),
        HEADS=plan.block_heads,
        HAS_D=D is not None,
        HAS_Z=z is not None,
        PACKED=decays["first_visible"] is not None,
        PRECISION=precision,
    )
    return results["y"]


def by_channel(D, plan):
    """D [h] or [h p] -> float32 [h p]"""
    return jnp.broadcast_to(D.astype(jnp.float32).reshape(plan.heads, -1), (plan.heads, plan.head_dim))
