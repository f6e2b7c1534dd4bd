"""What one step of a TPU kernel sees of each array, and the products it is made of."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from pallas_kernels.ssd.pallas_tpu.layout import Layout


class Place(NamedTuple):
    """Where a step works: indices of its row of the batch, of the group, of the block among all, of the chunk."""

    batch: Array
    group: Array
    block: Array
    chunk: Array


def block_spec(name: str, layout: Layout, place) -> pl.BlockSpec:
    """The block of the array `name` that the step at `place(*grid indices)` gets; gradients as what they belong to."""

    def spec(shape, index):
        return pl.BlockSpec(shape, lambda *indices: index(place(*indices)))

    tokens, lanes, n = layout.chunk, layout.block, layout.lanes_of_state
    match name:
        case "x" | "y" | "z" | "dx" | "dy" | "dz":
            return spec((None, tokens, lanes), lambda at: (at.batch, at.chunk, at.block))
        case "B" | "C" | "dB" | "dC":
            return spec((None, tokens, n), lambda at: (at.batch, at.chunk, at.group))
        case "dt" | "s" | "ddt" | "da":
            heads = layout.block_heads
            return spec((None, None, None, heads, tokens), lambda at: (at.batch, at.block, at.chunk, 0, 0))
        case "first_visible":
            return spec((None, None, 1, tokens), lambda at: (at.batch, at.chunk, 0, 0))
        case "D":
            return spec((1, lanes), lambda at: (0, at.block))
        case "dD":
            return spec((None, 1, lanes), lambda at: (at.batch, 0, at.block))
        case "states":
            return spec((None, None, n, lanes), lambda at: (at.batch, at.chunk, 0, at.block))
        case "state" | "final" | "dstate" | "dfinal":
            return spec((None, n, lanes), lambda at: (at.batch, 0, at.block))
    raise ValueError(f"name: got {name!r}, expected an array of the kernels")


def tokens_of(ref, chunk, layout: Layout) -> Array:
    """The chunk's rows of `ref`. What lies behind the end of the sequence is undefined there and zero here."""
    rows = ref[...]
    if layout.length % layout.chunk == 0:
        return rows
    token = lax.broadcasted_iota(jnp.int32, rows.shape, 0) + chunk * layout.chunk
    return jnp.where(token < layout.length, rows, jnp.zeros_like(rows))


# Products, summed in float32. They are named after what they contract: nothing is transposed beforehand.


def rows_by_columns(a: Array, b: Array, precision: lax.Precision) -> Array:
    """a b"""
    return _product(a, b, 1, 0, precision)


def rows_by_rows(a: Array, b: Array, precision: lax.Precision) -> Array:
    """a b^T"""
    return _product(a, b, 1, 1, precision)


def columns_by_columns(a: Array, b: Array, precision: lax.Precision) -> Array:
    """a^T b"""
    return _product(a, b, 0, 0, precision)


def _product(a, b, a_axis, b_axis, precision):
    numbers = (((a_axis,), (b_axis,)), ((), ()))
    return lax.dot_general(a, b, numbers, precision=precision, preferred_element_type=jnp.float32)
