"""From logits to the next token: greedy, temperature, top-k, top-p, min-p and a repetition penalty, as pure functions."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from ml_mamba_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to choose the next token. Hashable, so that it is a static argument of `jax.jit`.

    With several options the penalty acts first, then the temperature, then top-k, top-p and min-p, each on what is left.
    """

    temperature: float = 0.0
    """Logits are divided by it; 0 takes the likeliest token (greedy) and ignores the other options."""
    top_k: int | None = None
    """Only the k likeliest tokens; of equally likely ones those with the lowest ids."""
    top_p: float | None = None
    """Only the fewest, likeliest tokens whose probabilities reach p together (nucleus sampling, arXiv 1904.09751)."""

    min_p: float | None = None
    """Only tokens at least this many times as probable as the likeliest one (arXiv 2407.01082)."""
    repetition_penalty: float = 1.0
    """Positive logits of tokens that prompt or answer hold already are divided by it, negative ones multiplied
    (arXiv 1909.05858, section 4.1). 1: no penalty. It acts on greedy choices too."""

    def __post_init__(self):
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise InputError(f"temperature: got {self.temperature}, expected a finite number, 0 (greedy) or above")
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"top_k: got {self.top_k}, expected at least 1, or None for all tokens")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"top_p: got {self.top_p}, expected above 0 and at most 1, or None for all tokens")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise InputError(f"min_p: got {self.min_p}, expected 0 to 1, or None for all tokens")
        if not (self.repetition_penalty > 0 and math.isfinite(self.repetition_penalty)):
            raise InputError(
                f"repetition_penalty: got {self.repetition_penalty}, expected a finite number above 0; 1 is no penalty"
            )


def penalize_repetition(logits: Float[Array, "b v"], seen: Bool[Array, "b v"], penalty: float) -> Float[Array, "b v"]:
    """Logits with the `Sampling.repetition_penalty` on the tokens that were `seen`."""
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def sample(key: Array, logits: Float[Array, "b v"], sampling: Sampling) -> Int[Array, "b"]:
    """One token of each row, int32 [b]. Rows draw independently; `key` is not used when `sampling` is greedy."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    # Relative to the largest, so that a tiny temperature cannot overflow; nor may it become a zero of float32.
    temperature = max(sampling.temperature, float(jnp.finfo(logits.dtype).tiny))
    logits = (logits - jnp.max(logits, axis=-1, keepdims=True)) / temperature
    least = math.log(sampling.min_p) if sampling.min_p else -math.inf  # the likeliest token stands at 0
    top_p = 1.0 if sampling.top_p is None else sampling.top_p
    if sampling.top_k is None and top_p == 1:
        return jax.random.categorical(key, jnp.where(logits >= least, logits, -jnp.inf)).astype(jnp.int32)
    logits, ids = lax.top_k(logits, min(sampling.top_k or logits.shape[-1], logits.shape[-1]))
    if top_p < 1:
        probabilities = jax.nn.softmax(logits)
        likelier = jnp.cumsum(probabilities, axis=-1) - probabilities
        logits = jnp.where(likelier < top_p, logits, -jnp.inf)
    choice = jax.random.categorical(key, jnp.where(logits >= least, logits, -jnp.inf))
    return jnp.take_along_axis(ids, choice[:, None], axis=-1)[:, 0].astype(jnp.int32)
