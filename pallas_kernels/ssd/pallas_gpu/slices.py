"""Arrays as the kernels take them: heads in slices of 64 channels, narrower heads and states filled with zeros."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from pallas_kernels.ssd.pallas_gpu.tiles import CHUNK


class Slices(NamedTuple):
    """Of heads with a state of `state_size`."""

    heads: int
    head_dim: int
    state_size: int

    @property
    def per_head(self) -> int:
        return -(-self.head_dim // CHUNK)

    @property
    def total(self) -> int:
        return self.heads * self.per_head

    @property
    def n(self) -> int:
        """The width of a state in the kernels."""
        return next(width for width in (64, 128, 256) if width >= self.state_size)

    def values(self, a: Array) -> Array:
        """[b l h p] -> [b l slices 64]"""
        return _filled(a, -1, CHUNK).reshape(*a.shape[:2], self.total, CHUNK)

    def keys(self, a: Array) -> Array:
        """B or C: [b l g state_size] -> [b l' g n], with l' a multiple of 8, which the copies of tiles need."""
        return _filled(_filled(a, -1, self.n), 1, 8)

    def states(self, a: Array) -> Array:
        """[b h p state_size] -> [b slices 64 n] in float32"""
        a = _filled(_filled(a.astype(jnp.float32), 2, CHUNK), 3, self.n)
        return a.reshape(a.shape[0], self.total, CHUNK, self.n)

    def skip(self, D: Array) -> Array:
        """D in float32: [h] -> [slices], [h p] -> [slices 64], of several walks one after the other"""
        D = D.astype(jnp.float32)
        return jnp.repeat(D, self.per_head) if D.ndim == 1 else _filled(D, -1, CHUNK).reshape(-1, CHUNK)

    def without_filling(self, values: Array) -> Array:
        """[b l slices 64] -> [b l h p]"""
        return values.reshape(*values.shape[:2], self.heads, -1)[..., : self.head_dim]

    def states_without_filling(self, states: Array) -> Array:
        """[b .. slices 64 n] with one state for each slice -> [b h p state_size]"""
        states = states.reshape(states.shape[0], self.heads, -1, self.n)
        return states[:, :, : self.head_dim, : self.state_size]


def _filled(a: Array, axis: int, width: int) -> Array:
    """`a` with zeros behind it on `axis` up to the next multiple of `width`."""
    missing = -a.shape[axis] % width
    if not missing:
        return a
    fill = [(0, 0)] * a.ndim
    fill[axis] = (0, missing)
    return jnp.pad(a, fill)
