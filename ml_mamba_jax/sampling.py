"""From logits to the next token: greedy, temperature, top-k, top-p, min-p and a repetition penalty, as pure functions."""

import dataclasses
import math
import operator

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from ml_mamba_jax.errors import InputError

NARROWEST = 64
"""Top-k sorts out this many tokens, or twice, four times ... as many: few programs for all k."""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to choose the next token.

    With several options the penalty acts first, then the temperature, then top-k, top-p and min-p, each on what is left.
    """

    temperature: float = 0.0
    """Logits are divided by it; 0 takes the likeliest token (greedy) and ignores all other options but the penalty."""
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
        for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
            value = getattr(self, name)
            if not isinstance(value, int | float | np.number) and not (value is None and name in ("top_p", "min_p")):
                raise InputError(f"{name}: got {value!r}, expected a number")
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise InputError(f"temperature: got {self.temperature}, expected a finite number, 0 (greedy) or above")
        if self.top_k is not None and not (hasattr(self.top_k, "__index__") and operator.index(self.top_k) >= 1):
            raise InputError(
                f"top_k: got {self.top_k!r}, expected a whole number of at least 1, or None for all tokens"
            )
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"top_p: got {self.top_p}, expected above 0 and at most 1, or None for all tokens")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise InputError(f"min_p: got {self.min_p}, expected 0 to 1, or None for all tokens")
        if not (self.repetition_penalty > 0 and math.isfinite(self.repetition_penalty)):
            raise InputError(
                f"repetition_penalty: got {self.repetition_penalty}, expected a finite number above 0; 1 is no penalty"
            )

    def rule(self) -> "Rule":
        """The same for a compiled program, in which other numbers are no other program."""
        rule = Rule(
            least=np.float32(math.log(self.min_p) if self.min_p else -math.inf),
            repetition_penalty=np.float32(self.repetition_penalty),
        )
        if self.temperature == 0:
            return rule
        # A tiny temperature may not become a zero of float32.
        temperature = np.float32(max(self.temperature, float(np.finfo(np.float32).tiny)))
        rule = dataclasses.replace(rule, temperature=temperature)
        top_p = math.inf if self.top_p in (None, 1) else self.top_p  # rounded sums reach 1 before the last token
        if self.top_k is None and top_p == math.inf:
            return rule
        width = None
        if self.top_k is not None:
            width = NARROWEST
            while width < self.top_k:
                width *= 2
        top_k = np.int32(min(self.top_k or np.iinfo(np.int32).max, np.iinfo(np.int32).max))
        return dataclasses.replace(rule, top_k=top_k, top_p=np.float32(top_p), width=width)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rule:
    """A `Sampling` as arrays: what is None, and `width`, belong to the program, the numbers are its arguments."""

    least: Float[Array, ""] | np.float32
    """Logarithm of min_p."""
    repetition_penalty: Float[Array, ""] | np.float32
    temperature: Float[Array, ""] | np.float32 | None = None
    """None: greedy."""
    top_k: Int[Array, ""] | np.int32 | None = None
    top_p: Float[Array, ""] | np.float32 | None = None
    """Both or none of top_k and top_p."""
    width: int | None = dataclasses.field(default=None, metadata={"static": True})
    """Tokens to sort out for top_k and top_p, at least top_k; None: all."""


def penalize_repetition(
    logits: Float[Array, "b v"], seen: Bool[Array, "b v"], penalty: float | np.float32 | Float[Array, ""]
) -> Float[Array, "b v"]:
    """Logits with the `Sampling.repetition_penalty` on the tokens that were `seen`."""
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def sample(key: Array, logits: Float[Array, "b v"], rule: Rule) -> Int[Array, "b"]:
    """One token of each row, int32 [b]. Rows draw independently; a greedy rule does not use `key`.

    The repetition penalty is not applied here.
    """
    if rule.temperature is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    # Relative to the largest, so that a tiny temperature cannot overflow; the likeliest token stands at 0.
    logits = (logits - jnp.max(logits, axis=-1, keepdims=True)) / rule.temperature
    if rule.top_k is None:
        return jax.random.categorical(key, jnp.where(logits >= rule.least, logits, -jnp.inf)).astype(jnp.int32)
    logits, ids = lax.top_k(logits, min(rule.width or logits.shape[-1], logits.shape[-1]))
    logits = jnp.where(jnp.arange(logits.shape[-1])[None] < rule.top_k, logits, -jnp.inf)
    probabilities = jax.nn.softmax(logits)
    likelier = jnp.cumsum(probabilities, axis=-1) - probabilities
    logits = jnp.where((likelier < rule.top_p) & (logits >= rule.least), logits, -jnp.inf)
    choice = jax.random.categorical(key, logits)
    return jnp.take_along_axis(ids, choice[:, None], axis=-1)[:, 0].astype(jnp.int32)
