"""The recurrent state of a Mamba-2 language model as a plain value.

Its size does not depend on how many tokens have been read, so it can be kept, copied for several questions about one
image, and joined into batches. It is a NamedTuple of two arrays whose second axis is the batch. `state_file` writes it
to disk.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from ml_mamba_jax.config import Mamba2Config
from ml_mamba_jax.errors import InputError


class MambaState(NamedTuple):
    """`conv`: the last w - 1 inputs of each convolution, compute dtype. `ssm`: the SSD states, float32."""

    conv: Float[Array, "layers b w-1 c"]
    ssm: Float[Array, "layers b h p n"]

    @property
    def batch_size(self) -> int:
        return self.ssm.shape[1]


def init_state(config: Mamba2Config, batch_size: int, dtype: str = "float32") -> MambaState:
    """The state before the first token: zeros. `dtype` is the compute dtype of the model."""
    mixer = config.mixer
    return MambaState(
        conv=jnp.zeros((config.n_layers, batch_size, mixer.d_conv - 1, mixer.conv_channels), dtype),
        ssm=jnp.zeros((config.n_layers, batch_size, mixer.n_heads, mixer.head_dim, mixer.d_state), jnp.float32),
    )


def take_rows(state: MambaState, rows: Int[Array, "b"]) -> MambaState:
    """The rows of the batch at these indices, in this order; an index may repeat (one state, several questions)."""
    return jax.tree.map(lambda a: jnp.take(a, rows, axis=1), state)


def insert_rows(state: MambaState, rows: Int[Array, "b"], new: MambaState) -> MambaState:
    """`state` with the rows at these indices replaced by the rows of `new`."""
    return jax.tree.map(lambda a, b: a.at[:, rows].set(b.astype(a.dtype)), state, new)


def fork(state: MambaState, n: int) -> MambaState:
    """The state of one row, n times: for n ways to go on from it. Raises InputError for several rows."""
    if state.batch_size != 1:
        raise InputError(f"state: got {state.batch_size} rows, expected one to fork; choose it with take_rows")
    return take_rows(state, jnp.zeros(n, jnp.int32))


def join(states: Sequence[MambaState]) -> MambaState:
    """The rows of all states, in order, as one batch."""
    if not states:
        raise InputError("states: got none, expected at least one to join")
    return jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *states)


def check_state(state: MambaState, config: Mamba2Config, dtype: str, batch_size: int) -> None:
    """Raise InputError for a state that a model of this config cannot go on from; names the array."""
    expected = jax.eval_shape(lambda: init_state(config, batch_size, dtype))
    for name, got, want in zip(state._fields, state, expected, strict=True):
        if got.shape != want.shape or got.dtype != want.dtype:
            raise InputError(
                f"state: got {name} {got.dtype}{list(got.shape)}, expected {want.dtype}{list(want.shape)} for "
                f"{batch_size} rows of this model; pass a state that the same config wrote"
            )
