"""SSD in chunks, in plain XLA: runs everywhere, differentiable, memory linear in the number of tokens.

Within a chunk of Q tokens the recurrence is a masked matrix product (Mamba-2, arXiv 2405.21060, section 6); from
chunk to chunk only the state is carried. With s_i the running sum of dt A inside the chunk and S the state that
enters it:

    y_i = sum_{j<=i} (C_i . B_j) exp(s_i - s_j) dt_j x_j  +  exp(s_i) C_i S
    S'  = exp(s_Q) S + sum_j exp(s_Q - s_j) dt_j x_j B_j^T

Steps, decays, state and accumulators are float32 (float64 for float64 inputs); the operands of the products keep the
dtype of x. B and C are never repeated to the heads of a group. One chunk's [b h Q Q] weights exist at a time, in the
backward pass too: each chunk is rematerialised from the state that enters it.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.segments import number_segments
from pallas_kernels.ssd.discretize import discretize


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
    batch, length, heads, head_dim = x.shape
    groups, state_size = B.shape[2:]
    grouped = (groups, heads // groups)
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    if precision is None and x.dtype == jnp.float32:
        precision = lax.Precision.HIGHEST  # float32 means float32, not TF32 or bfloat16 passes
    chunks = -(-length // (chunk_size or _default_chunk_size()))
    chunk_size = -(-length // chunks)  # equal chunks: 80 tokens are 3 x 27, not 2 x 64 with 48 of padding

    dt = discretize(dt, dt_bias, dt_softplus, dt_limit, dtype)
    index = None
    if segment_ids is not None:
        index, real = number_segments(segment_ids)
        dt = jnp.where(real[..., None], dt, 0)
    A = A.reshape(*grouped, 1).astype(dtype)
    if D is not None:
        D = D.reshape(*grouped, 1, -1).astype(dtype)
    state = jnp.zeros((batch, *grouped, head_dim, state_size), dtype)
    if initial_state is not None:
        state = initial_state.reshape(state.shape).astype(dtype)

    def product(equation, *operands):
        return jnp.einsum(equation, *operands, precision=precision, preferred_element_type=dtype)

    def chunk(carry, inputs):
        """x, z [b g r q p], dt [b g r q], B, C [b g q n], index [b q], state [b g r p n]; r: heads of a group."""
        state, previous_index = carry
        x, z, dt, B, C, index = inputs
        log_decay = jnp.cumsum(dt * A[None], axis=-1)  # [b g r q]
        from_state = jnp.exp(log_decay)
        to_end = jnp.exp(_at_most_zero(log_decay[..., -1:] - log_decay))
        kept = from_state[..., -1]
        visible = jnp.tril(jnp.ones((chunk_size, chunk_size), bool))[None, None, None]
        if index is not None:
            visible &= (index[:, :, None] == index[:, None, :])[:, None, None]
            from_state = jnp.where((index == previous_index[:, None])[:, None, None], from_state, 0)
            to_end = jnp.where((index == index[:, -1:])[:, None, None], to_end, 0)
            kept = jnp.where((index[:, -1] == previous_index)[:, None, None], kept, 0)
            previous_index = index[:, -1]

        difference = _at_most_zero(log_decay[..., :, None] - log_decay[..., None, :])
        decay = jnp.exp(jnp.where(visible, difference, -jnp.inf))  # [b g r i j]
        weights = _scaled(decay, product("bgin,bgjn->bgij", C, B)[:, :, None])
        written = _scaled(x, dt[..., None])
        y = product("bgrij,bgrjp->bgrip", weights.astype(x.dtype), written.astype(x.dtype))
        y += _scaled(product("bgrpn,bgin->bgrip", state.astype(x.dtype), C), from_state[..., None])
        if D is not None:
            y += D[None] * x
        if z is not None:
            y *= jax.nn.silu(z.astype(dtype))

        written = _scaled(written, to_end[..., None])
        state = kept[..., None, None] * state + product("bgrjp,bgjn->bgrpn", written.astype(x.dtype), B)
        return (state, previous_index), y.astype(x.dtype)

    def split(a, *axes):
        """[b l ..] -> [chunks b axes q ..]; the filled tail neither writes to the state nor starts a sequence."""
        if a is None:
            return None
        tail = [(0, 0), (0, chunks * chunk_size - length)] + [(0, 0)] * (a.ndim - 2)
        a = jnp.pad(a, tail, mode="edge" if a is index else "constant")
        a = a.reshape(batch, chunks, chunk_size, *axes, *a.shape[3:])
        return jnp.moveaxis(a, (1, 2), (0, 2 + len(axes)))

    inputs = (
        split(x, *grouped),
        split(z, *grouped),
        split(dt, *grouped),
        split(B, groups),
        split(C, groups),
        split(index),
    )
    carry = (state, None if index is None else jnp.zeros(batch, index.dtype))
    (state, _), y = lax.scan(jax.checkpoint(chunk, prevent_cse=False), carry, inputs)
    y = jnp.moveaxis(y, (0, 4), (1, 2)).reshape(batch, chunks * chunk_size, heads, head_dim)[:, :length]
    if index is not None:
        y = jnp.where(real[..., None, None], y, 0)
    state = state.reshape(batch, heads, head_dim, state_size)
    return (y, state) if return_final_state else y


def ssd_step(state, x, dt, A, B, C, *, D=None, z=None, dt_bias=None, dt_softplus=False, dt_limit=(0.0, float("inf"))):
    batch, heads, head_dim = x.shape
    groups = B.shape[1]
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    grouped = (batch, groups, heads // groups)
    dt = discretize(dt, dt_bias, dt_softplus, dt_limit, dtype)
    decay = jnp.exp(dt * A[None].astype(dtype)).reshape(*grouped, 1, 1)
    written = (dt[..., None] * x.astype(dtype)).reshape(*grouped, head_dim, 1) * B.astype(dtype)[:, :, None, None]
    next_state = decay * state.reshape(*grouped, head_dim, -1).astype(dtype) + written
    y = jnp.sum(next_state * C.astype(dtype)[:, :, None, None], axis=-1).reshape(x.shape)
    if D is not None:
        y += D.reshape(1, heads, -1).astype(dtype) * x
    if z is not None:
        y *= jax.nn.silu(z.astype(dtype))
    return y.astype(x.dtype), next_state.reshape(state.shape).astype(state.dtype)


def _at_most_zero(a):
    """min(a, 0) whose derivative at 0 is 1: rounding can lift a difference of decays above 0; exp must not see it."""
    return jnp.where(a > 0, 0, a)


def _scaled(a, factor):
    """a * factor.

    The explicit broadcast matters: its transpose is a sum of its own, and with it XLA's CPU code for the gradient of
    the whole scan is 1.1 to 1.5 times as fast as with an implicit one.
    """
    return a * jnp.broadcast_to(factor, a.shape)


def _default_chunk_size() -> int:
    return 32 if jax.default_backend() == "cpu" else 128
