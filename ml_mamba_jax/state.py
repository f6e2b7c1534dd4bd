"""The recurrent state of a Mamba-2 language model as a plain value.

Its size does not depend on how many tokens have been read, so it can be kept, copied for several questions about one
image, and stacked into batches. It is a NamedTuple of two arrays whose second axis is the batch.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from ml_mamba_jax.config import Mamba2Config


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
