"""The tiles that the Mosaic GPU kernels of this package work on, and how vectors meet them."""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.walks import choose

CHUNK = 64  # tokens; also the width of a slice of a head: the height of one wgmma instruction
SHARED_MEMORY = 227 * 1024  # bytes that one thread block of an H100 or H200 may use

MATRIX = plgpu.Layout.WGMMA
ROWS = plgpu.Layout.WGMMA.reduce(1)  # a vector that belongs to the rows of a matrix in registers
COLUMNS = plgpu.Layout.WGMMA.reduce(0)

COMPILER_PARAMS = plgpu.CompilerParams(
    approx_math=True,
    # The kernels place their barriers themselves; each says why they suffice.
    unsafe_no_auto_barriers=True,
    # From 0.11 on the default infers layouts, and finds none for vectors read both as rows and as columns.
    lowering_semantics=plgpu.LoweringSemantics.Lane,
)


def operand(dtype, *shape):
    """Memory that wgmma reads: tiles of 8 x 64. Copies from and to it need a multiple of 8 tokens."""
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)))


def square(dtype, *leading):
    """64 x 64 as an `operand`, and without tiles for copies of any number of tokens: the bytes are the same."""
    shape = (*leading, CHUNK, CHUNK)
    flat = plgpu.SMEM(shape, dtype, transforms=(plgpu.SwizzleTransform(128),))
    return plgpu.RefUnion(operand(dtype, *shape), flat)


def rows(vector):
    """[64] over the rows of a square."""
    return lax.broadcast_in_dim(vector, (CHUNK, CHUNK), [0])


def columns(vector):
    return lax.broadcast_in_dim(vector, (CHUNK, CHUNK), [1])


def times(layout, backwards):
    """A number for each token of a chunk that grows as a walk meets them, from the end where `backwards`."""
    position = plgpu.broadcasted_iota(jnp.int32, (CHUNK,), 0, layout=layout)
    return position if backwards is False else position * choose(backwards, -1, 1)


def zeros(*shape):
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), MATRIX)


def keep_filled(fetch, steps: int, stages: int, consumed) -> None:
    """Keeps a ring of `stages` buffers filled: `fetch(step, slot)` for every step, as soon as its slot is `consumed`."""
    for step in range(min(stages, steps)):
        fetch(step, step)

    @pl.loop(stages, max(steps, stages))
    def _(step):
        slot = lax.rem(step, stages)
        plgpu.barrier_wait(consumed.at[slot])
        fetch(step, slot)
