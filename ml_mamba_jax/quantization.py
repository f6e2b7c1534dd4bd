"""Weights in 8 bits, for a language model that writes: each is read once a token, and reading is what a token costs.

A projection [k n] becomes whole numbers from -127 to 127 and one scale for each output channel n, the largest weight of that
channel divided by 127; zero stays zero. Activations are not quantised. Wherever a projection's parameter is a `Quantized`, the
model multiplies by the whole numbers, exact in every compute dtype, and scales the products: no copy of the weights is made.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Int8

from ml_mamba_jax.errors import InputError
from ml_mamba_jax.typing import Tokens

LARGEST = 127


class Quantized(NamedTuple):
    """Weights `values * scale`, of one matrix or of a stack of them, as a leaf of the parameters."""

    values: Int8[Array, "*layers k n"] | Int8[np.ndarray, "*layers k n"]
    scale: Float[Array, "*layers n"] | Float[np.ndarray, "*layers n"]
    """float32."""


def quantize(params: dict, *, donate: bool = False) -> dict:
    """Parameters whose language model has its projections in 8 bits: `in_proj`, `out_proj` and the head.

    A model that ties its embeddings keeps the table for the embeddings and gets a head beside it. Everything else stays as it
    is, and so does what is quantised already. The result goes wherever parameters go, but is not for training.

    Args:
        params: of jax or of NumPy, whose kind the result keeps: so what does not fit on a device is quantised on the host.
        donate: delete each array of `params` that was replaced, so that no more memory is needed than for `params`.

    Raises:
        InputError: parameters without a language model.
    """
    if "language" not in params:
        raise InputError(f"params: got {', '.join(params) or 'none'}, expected those of a model with a language part")
    language = dict(params["language"])
    blocks, mixer = language["blocks"], dict(language["blocks"]["mixer"])
    for name in ("in_proj", "out_proj"):
        mixer[name] = {**mixer[name], "kernel": _replaced(mixer[name]["kernel"], donate)}
    language["blocks"] = {**blocks, "mixer": mixer}
    if "head" in language:
        language["head"] = _replaced(language["head"], donate)
    else:
        language["head"] = _quantized(np.swapaxes(language["embedding"], 0, 1))
    return {**params, "language": language}


def is_quantized(params: dict) -> bool:
    """Whether these are parameters that `quantize` made, or the tree in which a checkpoint describes them."""
    head = params.get("language", {}).get("head")
    return isinstance(head, Quantized) or (isinstance(head, dict) and head.keys() == set(Quantized._fields))


def dequantize(weights: Quantized) -> Float[Array, "*layers k n"]:
    """The weights that `weights` stands for, float32."""
    return jnp.asarray(weights.values, jnp.float32) * jnp.expand_dims(weights.scale, -2)


class LogitError(NamedTuple):
    """How far logits are off, over all tokens."""

    relative: float
    """Root of the mean squared error, as a part of the standard deviation of a token's logits."""
    same_choice: float
    """Part of the tokens after which the likeliest next token stays the same."""


def logit_error(model, params: dict, quantized: dict, tokens: Tokens) -> LogitError:
    """Compare the logits after every token [b l] with those of the parameters that were quantised."""
    forward = jax.jit(lambda params: model.apply({"params": params}, tokens))
    expected, got = (forward(p)[..., : model.config.language.vocab_size] for p in (params, quantized))
    error = jnp.sqrt(jnp.mean((got - expected) ** 2) / jnp.mean(jnp.var(expected, axis=-1)))
    same = jnp.mean(jnp.argmax(got, axis=-1) == jnp.argmax(expected, axis=-1))
    return LogitError(float(error), float(same))


def dot_general(x: Array, kernel, dimension_numbers, precision=None, preferred_element_type=None) -> Array:
    """`lax.dot_general`, whose second operand may also be a `Quantized` [k n] of which k is summed over.

    The sum of a quantised product, and its scaling, are float32.
    """
    if not isinstance(kernel, Quantized):
        return lax.dot_general(x, kernel, dimension_numbers, precision, preferred_element_type)
    values = kernel.values.astype(x.dtype)
    y = lax.dot_general(x, values, dimension_numbers, precision, preferred_element_type=jnp.float32)
    y = y * jnp.expand_dims(kernel.scale, tuple(range(y.ndim - 1)))
    return y.astype(preferred_element_type or x.dtype)


def cast(*arrays, dtype=None, inexact: bool = True) -> list:
    """The arrays in `dtype`, but None and what is `Quantized`: as the `promote_dtype` of a layer of flax."""
    return [a if a is None or isinstance(a, Quantized) else jnp.asarray(a, dtype) for a in arrays]


def _replaced(weights, donate: bool) -> Quantized:
    if isinstance(weights, Quantized):
        return weights
    quantized = _quantized(weights)
    if donate and isinstance(weights, Array):
        jax.block_until_ready(quantized)
        weights.delete()
    return quantized


def _quantized(weights: Array | np.ndarray) -> Quantized:
    if isinstance(weights, Array):
        return _quantized_on_device(weights)
    stack = [_quantized_matrix(w, np) for w in weights.reshape(-1, *weights.shape[-2:])]
    values, scale = (np.stack(parts) for parts in zip(*stack, strict=True))
    return Quantized(values.reshape(weights.shape), scale.reshape(*weights.shape[:-2], weights.shape[-1]))


@jax.jit
def _quantized_on_device(weights: Array) -> Quantized:
    """One matrix after the other, so that only one is ever held in float32."""
    if weights.ndim == 2:
        return Quantized(*_quantized_matrix(weights, jnp))
    return lax.map(_quantized_on_device, weights)


def _quantized_matrix(weights, numpy) -> tuple:
    """A channel with NaN or infinity gets the scale NaN, so that it is found in the products."""
    weights = weights.astype(numpy.float32)
    scale = numpy.max(numpy.abs(weights), axis=0) / LARGEST
    divisor = numpy.where(numpy.isfinite(scale) & (scale > 0), scale, 1)
    values = numpy.clip(numpy.rint(numpy.nan_to_num(weights) / divisor[None]), -LARGEST, LARGEST)
    # Asked for by itself: the maximum of XLA on CPU passes over NaN.
    return values.astype(numpy.int8), numpy.where(numpy.isfinite(weights).all(axis=0), scale, numpy.nan)
