"""Sums along the tokens of a chunk (Pallas, Mosaic GPU, which has no cumulative sum).

64 chunks of any heads are the rows of a matrix, and their sums a product with a matrix of ones and zeros.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.ssd.pallas_gpu.tiles import CHUNK, COMPILER_PARAMS, MATRIX, operand, zeros
from pallas_kernels.walks import Walks


def over_chunks(body, inputs: dict, shape: tuple[int, ...], name: str, walks: Walks):
    """Runs `body(refs, out_ref, tile, backwards, ones)` on tiles of 64 chunks: [b h chunks *shape] in float32.

    `inputs` [b h chunks ..] are the references `refs` with their first three axes as one, of which `tile` are 64;
    `backwards` are those whose walk meets their last token first, as a square or for all of them; `ones` is memory for
    the second operand of `product_with_ones`, to be written once.
    """
    lead = next(iter(inputs.values())).shape[:3]
    total = math.prod(lead)
    filled = max(total, CHUNK)

    def flat(a):
        a = a.reshape(total, *a.shape[3:])
        return jnp.pad(a, ((0, filled - total), *((0, 0),) * (a.ndim - 1)))

    def kernel(*refs, ones):
        # The last tile begins earlier where it would not be full: two blocks then write the same numbers.
        start = jnp.minimum(lax.axis_index("tile") * CHUNK, filled - CHUNK)
        backwards = walks.backwards(start + positions()[0], total)
        body(dict(zip(inputs, refs[:-1], strict=True)), refs[-1], pl.ds(start, CHUNK), backwards, ones)

    out = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((filled, *shape), jnp.float32),
        scratch_types={"ones": operand(jnp.bfloat16, CHUNK, CHUNK)},
        grid=(-(-filled // CHUNK),),
        grid_names=("tile",),
        kernel_name=name,
        compiler_params=COMPILER_PARAMS,  # the one buffer is written once
    )(*map(flat, inputs.values()))
    return out[:total].reshape(*lead, *shape)


def positions():
    """The numbers of the rows and of the columns of a square."""
    return tuple(plgpu.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), axis, layout=MATRIX) for axis in (0, 1))


def product_with_ones(values, ones, backwards):
    """`values` [64 64] float32 times the ones and zeros in `ones`, transposed where `backwards`.

    In bfloat16, which holds ones exactly, and of which three added up hold a float32.
    """

    def product(acc, ones):
        rest = values
        for _ in range(3):
            part = rest.astype(ones.dtype)
            plgpu.wgmma(acc, part, ones)
            rest = rest - part.astype(jnp.float32)

    def sums(ones):
        return pl.run_state(functools.partial(product, ones=ones))(plgpu.ACC.init(zeros(CHUNK, CHUNK)))

    plgpu.commit_smem()
    if isinstance(backwards, bool):
        return sums(ones.transpose((1, 0)) if backwards else ones)
    return jnp.where(backwards, sums(ones.transpose((1, 0))), sums(ones))
