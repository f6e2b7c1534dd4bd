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


def outputs(arrays, plan, *, dt_softplus, dt_limit, return_final_state):
    """What `ssd` returns, for its arguments by name."""
    decays = prepare(step_sizes(arrays, dt_softplus, dt_limit), arrays, plan)
    states, final = chunk_states(
        arrays["x"], arrays["B"], decays, plan, ends=arrays.get("initial_state"), reverse=False
    )
    y = chunk_outputs(arrays, decays, states, plan)
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


def chunk_states(values, keys, decays, plan, *, ends, reverse):
    """(the states [b chunks h p n] that enter the chunks in the dtype of x, the last one [b h p n] in float32).

    `reverse`: the gradients of the states that leave the chunks, from dy and C instead of x and B; the last one is that
    of the state that enters the first chunk. `ends` [b h p n]: what the walk starts from, zeros if None.
    """
    p, n = plan.head_dim, plan.state_size
    tile_p, tile_n = min(64, filled(p)), plan.launch_of("ssd_states").slice
    results = launch(
        "ssd_states",
        plan,
        (-(-p // tile_p) * -(-n // tile_n), plan.heads, plan.batch),
        {
            "values": values,
            "keys": keys,
            **decays,
            "ends": None if ends is None else ends.astype(jnp.float32),
        },
        {
            "states": jax.ShapeDtypeStruct((plan.batch, plan.chunks, plan.heads, p, n), values.dtype),
            "last": jax.ShapeDtypeStruct((plan.batch, plan.heads, p, n), jnp.float32),
        },
        BP=tile_p,
        REVERSE=reverse,
        HAS_ENDS=ends is not None,
        PRECISION=plan.products.straight,
    )
    return results["states"], results["last"]


def chunk_outputs(arrays, decays, states, plan):
    """y [b l h p]"""
    x, D, z = arrays["x"], arrays.get("D"), arrays.get("z")
    results = launch(
        "ssd_outputs",
        plan,
        (plan.chunks, plan.heads // plan.block_heads, plan.batch),
        {
            "x": x,
            "B": arrays["B"],
            "C": arrays["C"],
            **decays,
            "states": states,
            "D": None if D is None else plan.by_channel(D),
            "z": z,
        },
        {"y": jax.ShapeDtypeStruct(x.shape, x.dtype)},
        HEADS=plan.block_heads,
        HAS_D=D is not None,
        HAS_Z=z is not None,
        PRECISION=plan.products.turned,
    )
    return results["y"]
