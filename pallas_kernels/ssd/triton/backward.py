"""The gradient of the SSD in Triton: from the states at the boundaries of the chunks, all chunks at once.

With S the state that enters a chunk, dS the gradient of the one that leaves it, dy that of the outputs, d the step
sizes and s the running sums of d A, for each head (Mamba-2, arXiv 2405.21060, section 6, differentiated):

    E_ij = exp(s_i - s_j) where i sees j, else 0      G_ij = C_i . B_j      M_ij = E_ij (dy_i . x_j)
    r_j  = sum_i E_ij G_ij dy_i + exp(s_Q - s_j) dS B_j
    dx_j = d_j r_j + D dy_j                           dd_j = x_j . r_j
    dB_j = sum over heads of  d_j (sum_i M_ij C_i + exp(s_Q - s_j) dS^T x_j)
    dC_i = sum over heads of  sum_j M_ij d_j B_j + exp(s_i) S^T dy_i

The gradient of s_i is the sum over row i of M_ij G_ij d_j less that over its column: numbers that nearly cancel, so both
come from one matrix in float32. dB and dC are added up over the heads of a program in registers and over programs by
XLA in a fixed order: no atomics, the same bits every time.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.segments import number_segments
from pallas_kernels.ssd.triton.forward import chunk_outputs, chunk_states, prepare, step_sizes
from pallas_kernels.ssd.triton.launch import launch


def gradients(arrays, cotangents, plan, *, dt_softplus, dt_limit, return_final_state):
    """The gradient of every array of `arrays`, the arguments of `ssd` by name, for those of its outputs."""
    dy, dfinal = cotangents if return_final_state else (cotangents, None)
    x, B, C = (arrays[name] for name in ("x", "B", "C"))

    def steps_of(given):
        steps = step_sizes(arrays | given, dt_softplus, dt_limit)
        return steps, steps * given["A"].astype(jnp.float32)[None, None]

    given = {name: arrays[name] for name in ("dt", "A", "dt_bias") if name in arrays}
    (steps, _), pull_back = jax.vjp(steps_of, given)
    decays = prepare(steps, arrays, plan)
    states, _ = chunk_states(x, B, decays, plan, ends=arrays.get("initial_state"), reverse=False)

    result = {}
    if "segment_ids" in arrays:
        dy = jnp.where(number_segments(arrays["segment_ids"]).real[..., None, None], dy, 0)
        result["segment_ids"] = jnp.zeros(arrays["segment_ids"].shape, jax.dtypes.float0)
    if "z" in arrays:
        z, without_gate = arrays["z"], {name: a for name, a in arrays.items() if name != "z"}
        y = chunk_outputs(without_gate, decays, states, plan)
        gate, pull_back_gate = jax.vjp(jax.nn.silu, z.astype(jnp.float32))
        result["z"] = pull_back_gate(dy * y.astype(jnp.float32))[0].astype(z.dtype)
        dy = (dy * gate).astype(x.dtype)
    dstates, entered = chunk_states(dy, C, decays, plan, ends=dfinal, reverse=True)
    if "initial_state" in arrays:
        result["initial_state"] = entered.astype(arrays["initial_state"].dtype)

    of_chunks = chunk_gradients(arrays, dy, decays, states, dstates, plan)
    result["x"] = of_chunks["dx"]
    result["B"], result["C"] = of_chunks["dB"], of_chunks["dC"]
    if "D" in arrays:
        dD = of_chunks["dD"].sum(axis=(0, 1))
        result["D"] = (dD.sum(axis=-1) if arrays["D"].ndim == 1 else dD).astype(arrays["D"].dtype)
    (of_steps,) = pull_back((plan.by_token(of_chunks["dd"]), plan.by_token(of_chunks["da"])))
    return result | of_steps


def chunk_gradients(arrays, dy, decays, states, dstates, plan):
    """By name: dx [b l h p]; dB, dC [b l g n]; dd, da [b h chunks Q], of d and d A; dD [b chunks h p]."""
    x, B, C, D = arrays["x"], arrays["B"], arrays["C"], arrays.get("D")
    batch, chunks, heads, groups, Q = plan.batch, plan.chunks, plan.heads, plan.groups, plan.chunk
    grid = (chunks, heads // plan.block_heads, batch)
    of_token = jax.ShapeDtypeStruct((batch, heads, chunks, Q), jnp.float32)
    of_chunk = jax.ShapeDtypeStruct((batch, heads, chunks), jnp.float32)
    of_block = jax.ShapeDtypeStruct((grid[1] // groups, batch, groups, chunks, Q, plan.state_size), jnp.float32)

    def through_states(values, keys, states, reading):
        return launch(
            "ssd_gradients_through_states",
            plan,
            grid,
            {"values": values, "keys": keys, **decays, "states": states, "dstates": dstates},
            {"dkeys": of_block, "through": of_token, "at_end": of_chunk},
            HEADS=plan.block_heads,
            READING=reading,
            PRECISION=plan.products.straight,
        )

    reading, writing = through_states(dy, C, states, True), through_states(x, B, dstates, False)
    inside = launch(
        "ssd_gradients",
        plan,
        grid,
        {
            "x": x,
            "dy": dy,
            "B": B,
            "C": C,
            **decays,
            "dstates": dstates,
            "read": reading["through"],
            "written": writing["through"],
            "at_end": reading["at_end"],
            "D": None if D is None else plan.by_channel(D),
        },
        {
            "dx": jax.ShapeDtypeStruct(x.shape, x.dtype),
            "dB": of_block,
            "dC": of_block,
            "dd": of_token,
            "da": of_token,
            "dD": jax.ShapeDtypeStruct((batch, chunks, heads, plan.head_dim), jnp.float32),
        },
        HEADS=plan.block_heads,
        HAS_D=D is not None,
        PRECISION=plan.products.turned,
    )
    dB, dC = plan.keys(inside["dB"] + writing["dkeys"]), plan.keys(inside["dC"] + reading["dkeys"])
    return inside | {"dB": dB.astype(B.dtype), "dC": dC.astype(C.dtype)}
