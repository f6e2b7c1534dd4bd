"""How the TPU kernels see their arrays: heads side by side in the lanes, tokens in chunks.

A TPU's vectors and matrix unit are 128 lanes wide. Heads of 64 channels therefore lie in pairs: a *tile* is as many
heads of one group as fill 128 lanes, or one head when it is wider. A *block* is the tiles that one step of a kernel
works on. Where head and tile fit, as in the published models, all of this is a change of shape without a copy;
elsewhere heads are filled with zeros up to the next fitting width.
"""

import dataclasses

import jax.numpy as jnp
from jax import Array

LANES = 128
BLOCK_LANES = 512  # enough products for one step to hide its overhead, few enough for VMEM
SUBLANES = 16  # rows of a bfloat16 tile; float32 needs half of it
DEFAULT_CHUNK, LARGEST_CHUNK = 128, 256
VMEM = 14 * 2**20  # bytes; the compiler gives a kernel 16 MiB, and `vmem_bytes` is an estimate


@dataclasses.dataclass(frozen=True)
class Layout:
    """Sizes of one call: those of its arguments, and how they are divided."""

    batch: int
    length: int
    heads: int
    head_dim: int
    groups: int
    state_size: int
    head_lanes: int
    """Of one head, zeros included."""
    tile_heads: int
    block_heads: int
    lanes_of_state: int
    """Width of B and C, zeros included."""
    chunk: int
    """Tokens of a chunk."""

    @property
    def chunks(self) -> int:
        return -(-self.length // self.chunk)

    @property
    def tile(self) -> int:
        return self.tile_heads * self.head_lanes

    @property
    def block(self) -> int:
        return self.block_heads * self.head_lanes

    @property
    def width(self) -> int:
        """Lanes of all heads."""
        return self.heads * self.head_lanes

    @property
    def blocks(self) -> int:
        return self.heads // self.block_heads

    @property
    def group_blocks(self) -> int:
        return self.blocks // self.groups

    # From arguments to operands and back.

    def in_lanes(self, a: Array) -> Array:
        """[b l h p] -> [b l width]"""
        return filled(a, -1, self.head_lanes).reshape(self.batch, self.length, self.width)

    def from_lanes(self, a: Array) -> Array:
        return a.reshape(self.batch, self.length, self.heads, self.head_lanes)[..., : self.head_dim]

    def skip_in_lanes(self, D: Array) -> Array:
        """D [h] or [h p] -> float32 [1 width]"""
        D = jnp.broadcast_to(D.astype(jnp.float32).reshape(self.heads, -1), (self.heads, self.head_dim))
        return filled(D, -1, self.head_lanes).reshape(1, self.width)

    def grouped(self, a: Array) -> Array:
        """B or C [b l g n] -> [b l g*n]"""
        return filled(a, -1, self.lanes_of_state).reshape(self.batch, self.length, -1)

    def state_in_lanes(self, state: Array) -> Array:
        """[b h p n] -> float32 [b n width]"""
        state = filled(filled(state.astype(jnp.float32), -1, self.lanes_of_state), -2, self.head_lanes)
        return jnp.moveaxis(state, -1, 1).reshape(self.batch, self.lanes_of_state, self.width)

    def state_from_lanes(self, state: Array) -> Array:
        state = state.reshape(self.batch, self.lanes_of_state, self.heads, self.head_lanes)
        return jnp.moveaxis(state, 1, -1)[:, :, : self.head_dim, : self.state_size]

    def in_rows(self, a: Array) -> Array:
        """One number for each token and head, [b l h] -> [b blocks chunks heads tokens]; zeros behind the end."""
        a = filled(a, 1, self.chunk).reshape(self.batch, self.chunks, self.chunk, self.blocks, self.block_heads)
        return jnp.transpose(a, (0, 3, 1, 4, 2))


def make_layout(x, B, chunk_size: int | None) -> Layout | None:
    """The layout for x [b l h p] and B [b l g n], arrays or abstract values; None if nothing fits into VMEM.

    Chunks are about as long as asked for, and shorter where heads or states are so wide that VMEM is too small.
    """
    batch, length, heads, head_dim = x.shape
    groups, state_size = B.shape[2:]
    per_group = heads // groups
    tile_heads = 1
    while head_dim * 2 * tile_heads <= LANES and per_group % (2 * tile_heads) == 0:
        tile_heads *= 2
    head_lanes = LANES // tile_heads if head_dim <= LANES else _next_multiple(head_dim, LANES)
    tiles = per_group // tile_heads
    most = max(1, BLOCK_LANES // (tile_heads * head_lanes))

    longest = min(chunk_size or DEFAULT_CHUNK, LARGEST_CHUNK)
    while True:
        chunk = _next_multiple(-(-length // -(-length // longest)), SUBLANES)  # chunks of about equal length
        for block_tiles in range(min(tiles, most), 0, -1):
            layout = Layout(
                batch=batch,
                length=length,
                heads=heads,
                head_dim=head_dim,
                groups=groups,
                state_size=state_size,
                head_lanes=head_lanes,
                tile_heads=tile_heads,
                block_heads=block_tiles * tile_heads,
                # A block may be as wide as its array, so one group needs no filling to full lanes.
                lanes_of_state=_next_multiple(state_size, SUBLANES if groups == 1 else LANES),
                chunk=chunk,
            )
            if tiles % block_tiles == 0 and vmem_bytes(layout, x.dtype.itemsize) <= VMEM:
                return layout
        if chunk == SUBLANES:
            return None
        longest = chunk // 2


def vmem_bytes(layout: Layout, itemsize: int) -> int:
    """About what the larger of the kernels, the backward one, needs with every optional argument."""
    tokens, lanes, n = layout.chunk, layout.block, layout.lanes_of_state
    copied = (4 * tokens * lanes + n * lanes + 2 * tokens * n) * itemsize + (2 * n * lanes + 2 * tokens * n) * 4
    carried = layout.group_blocks * n * lanes * 4
    # Intermediate results: what the compiler asked for at many shapes, rounded up. It works on all heads at once.
    squares = 8 + 2 * layout.block_heads
    intermediate = (16 * tokens * lanes + 5 * n * lanes + squares * tokens * tokens) * 4
    return 2 * copied + carried + intermediate


def filled(a: Array, axis: int, width: int) -> Array:
    """`a` with zeros behind it on `axis` up to the next multiple of `width`."""
    missing = -a.shape[axis] % width
    if not missing:
        return a
    fill = [(0, 0)] * a.ndim
    fill[axis] = (0, missing)
    return jnp.pad(a, fill)


def _next_multiple(number: int, width: int) -> int:
    return -(-number // width) * width
