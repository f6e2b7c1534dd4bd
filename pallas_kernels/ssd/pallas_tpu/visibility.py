"""What a kernel asks about packed sequences: `ref` is the chunk's row [1 tokens] of `ssd.visibility`."""

import jax.numpy as jnp
from jax import Array

from pallas_kernels.ssd.visibility import PADDING, start_of_sequence


def seen(ref) -> Array:
    """The first token each one sees, as a column [tokens 1]."""
    return jnp.transpose(ref[...])


def sees_nothing(ref) -> Array:
    """Which tokens are padding, as a column."""
    return seen(ref) >= PADDING - 1


def start_of_last(ref) -> Array:
    """Where in its chunk the sequence starts that the chunk's last token belongs to; -1: before the chunk. [1 1]"""
    return start_of_sequence(ref[:, -1:])
