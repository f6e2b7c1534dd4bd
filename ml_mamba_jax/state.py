"""The recurrent state of a Mamba-2 language model as a plain value.

Its size does not depend on how many tokens have been read, so it can be kept, copied for several questions about one
image, and joined into batches. It is a NamedTuple of two arrays whose second axis is the batch. `state_file` writes it
to disk.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
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


def take_rows(state: MambaState, rows: int | Sequence[int] | Int[Array, "b"] | Int[np.ndarray, "b"]) -> MambaState:
    """The rows of the batch at these indices, in this order; an index may repeat (one state, several questions).

    Raises InputError for an index beyond the batch.
    """
    rows = _indices(state, rows)
    return jax.tree.map(lambda a: jnp.take(a, rows, axis=1), state)


def insert_rows(
    state: MambaState, rows: int | Sequence[int] | Int[Array, "b"] | Int[np.ndarray, "b"], new: MambaState
) -> MambaState:
    """`state` with the rows at these indices replaced by the rows of `new`.

    Raises InputError for an index beyond the batch, or another number of rows.
    """
    rows = _indices(state, rows)
    _check_rows_alike([state, new])
    if len(rows) != new.batch_size:
        raise InputError(f"rows: got {len(rows)} indices for {new.batch_size} rows, expected one for each")
    return jax.tree.map(lambda a, b: a.at[:, rows].set(b), state, new)


def fork(state: MambaState, n: int) -> MambaState:
    """The state of one row, n times: for n ways to go on from it. Raises InputError for several rows."""
    check_is_state(state)
    if state.batch_size != 1:
        raise InputError(f"state: got {state.batch_size} rows, expected one to fork; choose it with take_rows")
    if n < 1:
        raise InputError(f"n: got {n}, expected at least 1 way to go on from the state")
    return take_rows(state, [0] * n)


def join(states: MambaState | Iterable[MambaState]) -> MambaState:
    """The rows of all states, in order, as one batch. Raises InputError for none, or states of different models."""
    states = [states] if isinstance(states, MambaState) else list(states)
    if not states:
        raise InputError("states: got none, expected at least one to join")
    _check_rows_alike(states)
    return jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *states)


def check_is_state(state: MambaState) -> None:
    if not isinstance(state, MambaState):
        raise InputError(f"state: got {type(state).__name__}, expected a MambaState; load_state reads one from a file")


def check_state(state: MambaState, config: Mamba2Config, dtype: str, batch_size: int) -> None:
    """Raise InputError for a state that a model of this config cannot go on from; names the array."""
    check_is_state(state)
    expected = jax.eval_shape(lambda: init_state(config, batch_size, dtype))
    for name, got, want in zip(state._fields, state, expected, strict=True):
        if got.shape != want.shape or got.dtype != want.dtype:
            raise InputError(
                f"state: got {name} {got.dtype}{list(got.shape)}, expected {want.dtype}{list(want.shape)} for "
                f"{batch_size} rows of this model; pass a state that the same config wrote"
            )


def _indices(state: MambaState, rows) -> np.ndarray | Array:
    check_is_state(state)
    if isinstance(rows, jax.core.Tracer):  # nothing is known of them yet
        return rows
    indices, n = np.atleast_1d(np.asarray(rows)), state.batch_size
    whole = indices.ndim == 1 and (indices.size == 0 or np.issubdtype(indices.dtype, np.integer))
    if not whole or ((indices < -n) | (indices >= n)).any():
        raise InputError(f"rows: got {rows}, expected indices from 0 to {n - 1}, those of the {n} rows of the state")
    return indices.astype(np.int32) % n


def _check_rows_alike(states: Sequence[MambaState]) -> None:
    for state in states:
        check_is_state(state)
        for name, a, b in zip(MambaState._fields, states[0], state, strict=True):
            shapes = [(*x.shape[:1], *x.shape[2:]) for x in (a, b)]
            if shapes[0] != shapes[1] or a.dtype != b.dtype:
                raise InputError(
                    f"states: got {name} {a.dtype}{list(a.shape)} and {b.dtype}{list(b.shape)}, expected the same but for "
                    "the number of rows; put states of one model together"
                )
