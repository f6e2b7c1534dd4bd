"""How the work of the Triton kernels is divided: chunks, tiles and heads for each program, warps, kinds of products."""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

WIDEST_HEAD, WIDEST_STATE = 128, 256
LARGEST_FLOAT32_STATE = 128 * 128  # numbers of a head's state whose tiles fit into 99 KiB of shared memory
PROGRAMS = 1024  # that a launch should have before a program takes several heads: a few for each multiprocessor


class Products(NamedTuple):
    """How float32 is multiplied, in Triton's words: where both operands lie as they are needed, and where one is turned."""

    straight: str
    turned: str


# Off the tensor cores Triton reads a turned operand through bank conflicts, ten times as slowly. bf16x6 adds up the
# products of three bfloat16 parts of each operand, 24 bits together: measured to be as exact as float32 products.
FLOAT32 = Products("ieee", "bf16x6")
TF32 = Products("tf32", "tf32")


class Launch(NamedTuple):
    """How a kernel is compiled: warps for each program, stages of its loops, how much of n a product takes at once."""

    warps: int
    stages: int
    slice: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sizes of one call and of its tiles."""

    batch: int
    length: int
    heads: int
    head_dim: int
    groups: int
    state_size: int
    exact: bool
    """float32 that is multiplied as such."""
    itemsize: int

    @property
    def chunk(self) -> int:
        """Tokens of a chunk: 64 rows make the fastest products; of wide states or float32 fewer fit into registers."""
        return 32 if self.itemsize == 4 or self.state_size > 128 else 64

    @property
    def chunks(self) -> int:
        return -(-self.length // self.chunk)

    @property
    def block_heads(self) -> int:
        """Heads of one group that a program takes: they share the products of B and C."""
        heads, places = self.heads // self.groups, self.batch * self.chunks
        return max(n for n in range(1, 17) if heads % n == 0 and (n == 1 or places * self.heads // n >= PROGRAMS))

    @property
    def products(self) -> Products:
        return FLOAT32 if self.exact else TF32

    def launch_of(self, kernel: str) -> Launch:
        """For 16 bits and p n up to 64 x 128 the fastest of those tried on an H100.

        The others were chosen by what the compiler says for compute capabilities 8.0, 8.6 and 9.0: they need few
        spilled registers and at most 99 KiB of shared memory.
        """
        n, wide = filled(self.state_size), filled(self.head_dim) * filled(self.state_size) > 64 * 128
        if kernel == "ssd_states":
            return Launch(4, 3, min(64, n))
        if self.itemsize == 4:
            return {
                "ssd_outputs": Launch(8, 2, min(32, n)),
                "ssd_gradients_through_states": Launch(8, 2, n),
                "ssd_gradients": Launch(8, 1, min(32, n)),
            }[kernel]
        return {
            "ssd_outputs": Launch(4, 1 if wide else 3, n),
            "ssd_gradients_through_states": Launch(8 if wide else 4, 1, n),
            "ssd_gradients": Launch(8 if wide else 4, 2, min(64, n) if wide else n),
        }[kernel]

    # From arguments to what the kernels read and back.

    def by_chunk(self, a: Array) -> Array:
        """[b l h] -> [b h chunks Q], zeros behind the end"""
        a = jnp.pad(a, ((0, 0), (0, self.chunks * self.chunk - self.length), (0, 0)))
        return jnp.swapaxes(a, 1, 2).reshape(self.batch, self.heads, self.chunks, self.chunk)

    def by_token(self, a: Array) -> Array:
        """[b h chunks Q] -> [b l h]"""
        return jnp.swapaxes(a.reshape(self.batch, self.heads, -1), 1, 2)[:, : self.length]

    def by_channel(self, D: Array) -> Array:
        """D [h] or [h p] -> float32 [h p]"""
        return jnp.broadcast_to(D.astype(jnp.float32).reshape(self.heads, -1), (self.heads, self.head_dim))

    def keys(self, a: Array) -> Array:
        """[blocks b g chunks Q n] -> [b l g n], the sum over the blocks"""
        a = a.sum(axis=0).reshape(self.batch, self.groups, -1, self.state_size)
        return jnp.swapaxes(a, 1, 2)[:, : self.length]


def make_plan(x: Array, B: Array, precision) -> Plan:
    """For the arguments x [b l h p], B [b l g n] and `precision` of `ssd`: float32 means float32, unless less is asked."""
    exact = precision is None or lax.Precision(precision) == lax.Precision.HIGHEST
    return Plan(*x.shape, *B.shape[2:], exact=exact, itemsize=x.dtype.itemsize)


def is_one_precision(precision) -> bool:
    """Whether it is a `lax.Precision`, the name of one, or None; and not two of them, or an algorithm."""
    try:
        return precision is None or isinstance(lax.Precision(precision), lax.Precision)
    except ValueError:
        return False


def filled(width: int) -> int:
    """The power of two, 16 at least, that a tile of `width` is filled up to."""
    return max(16, 1 << (width - 1).bit_length())
