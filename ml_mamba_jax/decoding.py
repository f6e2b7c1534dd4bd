"""Token ids in, token ids out: read prompts, then write token by token in a loop on the device.

`read` takes prompts of any length in pieces of bounded size, `write` goes on for as many tokens as asked. What lies
between two calls is a `Decoding`, a plain value. Texts and images are the business of `generation`.
"""

import functools
import operator
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from ml_mamba_jax.errors import InputError, NonFiniteError
from ml_mamba_jax.model import MLMamba
from ml_mamba_jax.sampling import Rule, Sampling, penalize_repetition, sample
from ml_mamba_jax.state import MambaState, check_state, init_state
from ml_mamba_jax.typing import Images, RowMask, Tokens

SHORTEST_BUCKET = 32
"""Prompts are padded to this many tokens, or twice, four times ... as many: few lengths, hence few compilations."""
PIECE = 2048
"""Tokens read at once; longer prompts are read in pieces, so that memory does not grow with their length."""


class Decoding(NamedTuple):
    """Between two tokens: the logits of the next one, the state after the last one, and how far the writing is."""

    logits: Float[Array, "b v"]
    state: MambaState
    finished: Bool[Array, "b"]
    finite: Bool[Array, "b"]
    """No token of the row was chosen from logits with NaN or infinity among them."""
    position: Int[Array, ""]
    """Tokens written since the prompt."""
    seen: Bool[Array, "b v"] | None
    """The tokens of prompt and answer so far; None where no repetition penalty asks for them."""


def bucket(length: int, shortest: int = SHORTEST_BUCKET) -> int:
    """The length that `length` tokens are padded to: `shortest` times a power of two, above `PIECE` plus that."""
    whole, rest = divmod(length, PIECE)
    if whole and not rest:
        return length
    padded = shortest
    while padded < rest:
        padded *= 2
    return whole * PIECE + padded


def pad_rows(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Int[Array, "b l"], Int[Array, "b"]]:
    """Rows of ids -> int32 tokens, padded on the right to the length of a bucket, and the lengths of the rows.

    Raises InputError for no rows.
    """
    if not rows:
        raise InputError("rows: got none, expected the token ids of at least one prompt")
    tokens = np.full((len(rows), bucket(max(len(row) for row in rows))), pad_id, np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    return jnp.asarray(tokens), jnp.asarray([len(row) for row in rows], jnp.int32)


def read(
    model: MLMamba,
    params: dict,
    tokens: Tokens,
    lengths: Int[Array, "b"],
    images: Images | None = None,
    image_mask: RowMask | None = None,
    *,
    state: MambaState | None = None,
    seen: Bool[Array, "b v"] | None = None,
    donate: bool = False,
) -> Decoding:
    """Read prompts [b l], padded on the right beyond `lengths` [b], `PIECE` tokens at a time.

    Args:
        state: what came before, if anything.
        seen: the tokens that came before, for a repetition penalty.
        donate: take the memory of `state`, which is gone afterwards, instead of copying it.

    Raises:
        InputError: a state of another model or another batch size; a row without a token and without an image, after
            which there would be nothing to say.
    """
    batch, length = tokens.shape
    if state is not None:
        check_state(state, model.config.language, model.config.dtype, batch)
    lengths = np.asarray(lengths)
    shown = np.zeros(batch, bool) if images is None else np.ones(batch, bool) if image_mask is None else image_mask
    if not batch or ((lengths < 1) & ~np.asarray(shown)).any():
        raise InputError(
            f"tokens: got rows of {lengths.tolist()} tokens, expected at least one token or an image in each"
        )
    if length > PIECE:
        tokens = np.asarray(tokens)  # cut here: on the device each cut would be a program
    copied = state is None or not donate
    decoding = _nothing_written(model, batch, state if copied else None, seen)
    if not copied:
        decoding = decoding._replace(state=state)
    for start in range(0, max(length, 1), PIECE):
        piece = tokens[:, start : start + PIECE] if length > PIECE else tokens
        in_piece = np.clip(lengths - start, 0, piece.shape[1]).astype(np.int32)
        decoding = _read_piece(model, params, piece, in_piece, images, image_mask, decoding)
        images = image_mask = None
    return decoding


@functools.partial(jax.jit, static_argnames=("model", "batch"))
def _nothing_written(model: MLMamba, batch: int, state: MambaState | None, seen: Array | None) -> Decoding:
    """What comes before a prompt, in arrays of its own: one program then reads whatever came before."""
    language = model.config.language
    none = jnp.zeros(batch, bool)
    return Decoding(
        logits=jnp.zeros((batch, language.padded_vocab_size), jnp.float32),
        state=init_state(language, batch, model.config.dtype) if state is None else jax.tree.map(jnp.copy, state),
        finished=none,
        finite=~none,
        position=jnp.zeros((), jnp.int32),
        seen=None if seen is None else jnp.copy(seen),
    )


@functools.partial(jax.jit, static_argnames="model", donate_argnames="decoding")
def _read_piece(model, params, tokens, lengths, images, image_mask, decoding: Decoding) -> Decoding:
    logits, state = model.apply(
        {"params": params},
        tokens,
        images=images,
        image_mask=image_mask,
        lengths=lengths,
        state=decoding.state,
        method="prefill",
    )
    seen, (batch, length) = decoding.seen, tokens.shape
    shown = lengths > 0
    if images is not None:
        shown = jnp.ones(batch, bool) if image_mask is None else shown | image_mask
    logits = jnp.where(shown[:, None], logits, decoding.logits)  # of rows that ended in an earlier piece
    if seen is not None:
        real = jnp.arange(length)[None] < lengths[:, None]
        seen = seen.at[jnp.arange(batch)[:, None], tokens].max(real)
    return decoding._replace(logits=logits, state=state, seen=seen)


def advance(
    model: MLMamba,
    params: dict,
    decoding: Decoding,
    key: Array,
    *,
    rule: Rule,
    stop_ids: tuple[int, ...],
    vocab_size: int,
) -> tuple[Int[Array, "b"], Decoding]:
    """Choose the next token of each row and read it. A row that chooses a stop id is finished and keeps its state."""
    # The rows of the embedding beyond the vocabulary belong to no token.
    logits, seen = decoding.logits[:, :vocab_size], decoding.seen
    finite = decoding.finite & (decoding.finished | jnp.isfinite(logits).all(axis=-1))
    if seen is not None:
        logits = penalize_repetition(logits, seen[:, :vocab_size], rule.repetition_penalty)
    token = sample(jax.random.fold_in(key, decoding.position), logits, rule)
    finished = decoding.finished
    for stop_id in stop_ids:
        finished = finished | (token == stop_id)
    logits, state = model.apply({"params": params}, token, decoding.state, ~finished, method="step")
    if seen is not None:
        seen = seen.at[jnp.arange(token.size), token].max(~finished)
    return token, Decoding(logits, state, finished, finite, decoding.position + 1, seen)


def write(
    model: MLMamba,
    params: dict,
    decoding: Decoding,
    key: Array,
    limit: int | Int[Array, ""],
    *,
    capacity: int,
    sampling: Sampling,
    stop_ids: tuple[int, ...],
    vocab_size: int,
    donate: bool = False,
) -> tuple[Int[Array, "b capacity"], Int[Array, "b"], Decoding]:
    """Write up to `limit` tokens, at most `capacity`, in one loop on the device; rows that finish wait for the others.

    `capacity`, `stop_ids`, `vocab_size` and the kinds of `sampling` that are used make a program; numbers do not.

    Args:
        donate: take the memory of `decoding`, which is gone afterwards.

    Returns:
        The new tokens, int32 and 0 beyond the end of a row; their numbers; and what follows them.
    """
    loop = _write_in_place if donate else _write
    options = {"capacity": capacity, "stop_ids": stop_ids, "vocab_size": vocab_size}
    return loop(model, params, decoding, key, limit, sampling.rule(), **options)


write_in_place = functools.partial(write, donate=True)
"""`write` that takes the memory of `decoding`."""


def _loop(model, params, decoding, key, limit, rule: Rule, *, capacity, stop_ids, vocab_size):
    start = decoding.position

    def unfinished(carry):
        decoding, _, _ = carry
        return (decoding.position - start < jnp.minimum(limit, capacity)) & ~jnp.all(decoding.finished)

    def write_one(carry):
        decoding, written, count = carry
        token, following = advance(model, params, decoding, key, rule=rule, stop_ids=stop_ids, vocab_size=vocab_size)
        token = jnp.where(following.finished, 0, token)
        written = lax.dynamic_update_index_in_dim(written, token, decoding.position - start, axis=1)
        return following, written, count + ~following.finished

    batch = decoding.finished.size
    carry = (decoding, jnp.zeros((batch, capacity), jnp.int32), jnp.zeros(batch, jnp.int32))
    decoding, written, count = lax.while_loop(unfinished, write_one, carry)
    return written, count, decoding


_STATIC = ("model", "capacity", "stop_ids", "vocab_size")
_write = jax.jit(_loop, static_argnames=_STATIC)
_write_in_place = jax.jit(_loop, static_argnames=_STATIC, donate_argnames="decoding")


def generate_tokens(
    model: MLMamba,
    params: dict,
    tokens: Tokens,
    lengths: Int[Array, "b"],
    images: Images | None,
    image_mask: RowMask | None,
    key: Array,
    *,
    state: MambaState | None = None,
    max_new_tokens: int = 128,
    sampling: Sampling = Sampling(),  # noqa: B008, it is frozen
    stop_ids: tuple[int, ...] = (0,),
    vocab_size: int | None = None,
) -> tuple[Int[Array, "b max_new_tokens"], Int[Array, "b"], MambaState]:
    """Continue prompts [b l], padded on the right beyond `lengths` [b]. The loop over tokens runs on the device.

    Args:
        image_mask: rows that have an image, as in `MLMamba`.
        state: what came before, as in `MLMamba.prefill`.
        stop_ids: tokens that end a row. They are not part of its answer.
        vocab_size: tokens with ids from here on are never chosen. Default: the vocabulary of the config.

    Returns:
        The new tokens, int32 and 0 beyond the end of a row; their numbers; and the state after each row's last one.

    Raises:
        InputError: a state of another model or another batch size, or `max_new_tokens` below 1.
        NonFiniteError: the model computed NaN or infinity.
    """
    max_new_tokens = checked_max_new_tokens(max_new_tokens)
    seen = nothing_seen(model, tokens.shape[0], sampling)
    decoding = read(model, params, tokens, lengths, images, image_mask, state=state, seen=seen)
    written, count, decoding = write_in_place(
        model,
        params,
        decoding,
        key,
        max_new_tokens,
        capacity=bucket(max_new_tokens),
        sampling=sampling,
        stop_ids=stop_ids,
        vocab_size=vocab_size or model.config.language.vocab_size,
    )
    check_finite("generate_tokens", decoding.state, decoding.finite)
    return written[:, :max_new_tokens], count, decoding.state


def check_finite(what: str, state: MambaState, finite: Bool[Array, "b"] | None = None) -> None:
    """Raise NonFiniteError, in the name of the function `what`, for a state with NaN or infinity in it.

    One that arises before the last scan reaches the state and stays there; `Decoding.finite` tells of others.
    """
    if not _all_finite(state, finite):
        raise NonFiniteError(
            f"{what}: got NaN or infinity inside the model, expected finite numbers; "
            "check the parameters, or compute in float32"
        )


@jax.jit
def _all_finite(state: MambaState, finite: Array | None) -> Array:
    return jnp.isfinite(state.ssm).all() & (True if finite is None else finite.all())


def checked_max_new_tokens(max_new_tokens: int) -> int:
    """Raises InputError for what is no whole number of at least 1."""
    if not hasattr(max_new_tokens, "__index__") or operator.index(max_new_tokens) < 1:
        raise InputError(f"max_new_tokens: got {max_new_tokens!r}, expected a whole number of at least 1")
    return operator.index(max_new_tokens)


def nothing_seen(model: MLMamba, batch_size: int, sampling: Sampling) -> Bool[Array, "b v"] | None:
    """`Decoding.seen` before the first token."""
    if sampling.repetition_penalty == 1:
        return None
    return jnp.zeros((batch_size, model.config.language.padded_vocab_size), bool)
