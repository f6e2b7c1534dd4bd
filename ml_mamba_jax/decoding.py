"""Token ids in, token ids out: read prompts, then write token by token in a loop on the device.

`read` takes prompts of any length in pieces of bounded size, `write` goes on for as many tokens as asked. What lies
between two calls is a `Decoding`, a plain value. Texts and images are the business of `generation`.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from ml_mamba_jax.errors import InputError
from ml_mamba_jax.model import MLMamba
from ml_mamba_jax.sampling import Sampling, penalize_repetition, sample
from ml_mamba_jax.state import MambaState, check_state
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
    """Rows of ids -> int32 tokens, padded on the right to the length of a bucket, and the lengths of the rows."""
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
) -> Decoding:
    """Read prompts [b l], padded on the right beyond `lengths` [b], `PIECE` tokens at a time.

    Args:
        state: what came before, if anything.
        seen: the tokens that came before, for a repetition penalty.

    Raises:
        InputError: a state of another model or another batch size.
    """
    if state is not None:
        check_state(state, model.config.language, model.config.dtype, tokens.shape[0])
    decoding = None
    for start in range(0, max(tokens.shape[1], 1), PIECE):
        piece = tokens[:, start : start + PIECE]
        first = decoding is None
        decoding = _read_piece(
            model,
            params,
            piece,
            jnp.clip(lengths - start, 0, piece.shape[1]),
            images if first else None,
            image_mask if first else None,
            state if first else decoding.state,
            seen if first else decoding.seen,
            None if first else decoding.logits,
        )
    return decoding


@functools.partial(jax.jit, static_argnames="model")
def _read_piece(model, params, tokens, lengths, images, image_mask, state, seen, logits_before) -> Decoding:
    logits, state = model.apply(
        {"params": params},
        tokens,
        images=images,
        image_mask=image_mask,
        lengths=lengths,
        state=state,
        method="prefill",
    )
    if logits_before is not None:  # rows that ended in an earlier piece have theirs from there
        logits = jnp.where((lengths > 0)[:, None], logits, logits_before)
    batch, length = tokens.shape
    if seen is not None:
        real = jnp.arange(length)[None] < lengths[:, None]
        seen = seen.at[jnp.arange(batch)[:, None], tokens].max(real)
    return Decoding(logits, state, jnp.zeros(batch, bool), jnp.zeros((), jnp.int32), seen)


def advance(
    model: MLMamba,
    params: dict,
    decoding: Decoding,
    key: Array,
    *,
    sampling: Sampling,
    stop_ids: tuple[int, ...],
    vocab_size: int,
) -> tuple[Int[Array, "b"], Decoding]:
    """Choose the next token of each row and read it. A row that chooses a stop id is finished and keeps its state."""
    # The rows of the embedding beyond the vocabulary belong to no token.
    logits, seen = decoding.logits[:, :vocab_size], decoding.seen
    if seen is not None:
        logits = penalize_repetition(logits, seen[:, :vocab_size], sampling.repetition_penalty)
    token = sample(jax.random.fold_in(key, decoding.position), logits, sampling)
    finished = decoding.finished
    for stop_id in stop_ids:
        finished = finished | (token == stop_id)
    logits, state = model.apply({"params": params}, token, decoding.state, ~finished, method="step")
    if seen is not None:
        seen = seen.at[jnp.arange(token.size), token].max(~finished)
    return token, Decoding(logits, state, finished, decoding.position + 1, seen)


def _write(
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
) -> tuple[Int[Array, "b capacity"], Int[Array, "b"], Decoding]:
    """Write up to `limit` tokens, at most `capacity`, in one loop on the device; rows that finish wait for the others.

    Returns the new tokens, int32 and 0 beyond the end of a row; their numbers; and what follows them.
    """
    start = decoding.position

    def unfinished(carry):
        decoding, _, _ = carry
        return (decoding.position - start < jnp.minimum(limit, capacity)) & ~jnp.all(decoding.finished)

    def write_one(carry):
        decoding, written, count = carry
        token, following = advance(
            model, params, decoding, key, sampling=sampling, stop_ids=stop_ids, vocab_size=vocab_size
        )
        token = jnp.where(following.finished, 0, token)
        written = lax.dynamic_update_index_in_dim(written, token, decoding.position - start, axis=1)
        return following, written, count + ~following.finished

    batch = decoding.finished.size
    carry = (decoding, jnp.zeros((batch, capacity), jnp.int32), jnp.zeros(batch, jnp.int32))
    decoding, written, count = lax.while_loop(unfinished, write_one, carry)
    return written, count, decoding


_STATIC = ("model", "capacity", "sampling", "stop_ids", "vocab_size")
write = jax.jit(_write, static_argnames=_STATIC)
write_in_place = jax.jit(_write, static_argnames=_STATIC, donate_argnames="decoding")
"""`write` that takes the memory of `decoding`, which is gone afterwards."""


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
    """
    check_max_new_tokens(max_new_tokens)
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
    return written[:, :max_new_tokens], count, decoding.state


def check_max_new_tokens(max_new_tokens: int) -> None:
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens: got {max_new_tokens}, expected at least 1")


def nothing_seen(model: MLMamba, batch_size: int, sampling: Sampling) -> Bool[Array, "b v"] | None:
    """`Decoding.seen` before the first token."""
    if sampling.repetition_penalty == 1:
        return None
    return jnp.zeros((batch_size, model.config.language.padded_vocab_size), bool)
