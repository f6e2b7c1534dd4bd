"""How the work of the Triton kernels is divided: chunks, tiles and heads for each program, warps."""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

WIDEST_HEAD, WIDEST_STATE = 128, 256
PROGRAMS = 1024  # that a launch should have before a program takes several heads: a few for each multiprocessor


class Products(NamedTuple):
    """How float32 is multiplied, in Triton's words, where both operands lie as they are needed, and where one is turned."""

    straight: str
    turned: str


# Without tensor cores Triton turns an operand very slowly. bf16x6 adds up products of three bfloat16 parts of each
# operand, 24 bits together: measured as exact as float32.
FLOAT32 = Products("ieee", "bf16x6")
FLOAT32_WITHOUT_PARTS = Products("ieee", "ieee")
TF32 = Products("tf32", "tf32")


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sizes of one call and of its tiles."""

    batch: int
    length: int
    heads: int
    head_dim: int
    groups: int
    state_size: int
    chunk: int
    """Tokens of a chunk."""
    parts: bool
    """Whether products need so many registers that more threads share a tile, and sums over n are taken in slices."""

    @property
    def chunks(self) -> int:
        return -(-self.length // self.chunk)

    @property
    def block_heads(self) -> int:
        """Heads of one group that a program takes: they share the products of B and C."""
        heads, places = self.heads // self.groups, self.batch * self.chunks
        return max(n for n in range(1, 17) if heads % n == 0 and (n == 1 or places * self.heads // n >= PROGRAMS))

    @property
    def tiles(self) -> dict[str, int]:
        """Constants that all kernels but the first know alike."""
        return {
            "P": self.head_dim,
            "N": self.state_size,
            "Q": self.chunk,
            "BP": filled(self.head_dim),
            "BN": filled(self.state_size),
            "HEADS": self.block_heads,
        }

    # From arguments to what the kernels read and back.

    def by_chunk(self, a: Array) -> Array:
        """[b l h] -> [b h chunks Q], zeros behind the end"""
        a = jnp.pad(a, ((0, 0), (0, self.chunks * self.chunk - self.length), (0, 0)))
        return jnp.swapaxes(a, 1, 2).reshape(self.batch, self.heads, self.chunks, self.chunk)

    def by_token(self, a: Array) -> Array:
        """[b h chunks Q] -> [b l h]"""
        return jnp.swapaxes(a.reshape(self.batch, self.heads, -1), 1, 2)[:, : self.length]

    def keys(self, a: Array) -> Array:
        """[blocks b g chunks Q n] -> [b l g n], the sum over the blocks"""
        a = a.sum(axis=0).reshape(self.batch, self.groups, -1, self.state_size)
        return jnp.swapaxes(a, 1, 2)[:, : self.length]


def make_plan(x: Array, B: Array) -> Plan:
    """For the arguments x [b l h p] and B [b l g n] of `ssd`."""
    # Products of 64 rows are the fastest; where accumulators are wide or operands float32, fewer fit into registers.
    chunk = 32 if x.dtype == jnp.float32 or B.shape[3] > 128 else 64
    return Plan(*x.shape, *B.shape[2:], chunk)


def filled(width: int) -> int:
    """The power of two, 16 at least, that a tile of `width` is filled up to."""
    return max(16, 1 << (width - 1).bit_length())
