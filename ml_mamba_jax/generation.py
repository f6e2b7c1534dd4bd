"""Text from a model: read the prompts at once, then write token by token on the device.

`generate` answers a batch, `stream` yields one answer as it is written, `Chat` keeps the recurrent state from turn to
turn. All of them stand on `generate_tokens` and `advance`, which know only token ids.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from ml_mamba_jax.batching import encode_turns, pad_rows, stack_images
from ml_mamba_jax.config import MLMambaConfig
from ml_mamba_jax.errors import InputError, NonFiniteError
from ml_mamba_jax.model import MLMamba
from ml_mamba_jax.prompt import Turn, render
from ml_mamba_jax.sampling import Sampling, sample
from ml_mamba_jax.state import MambaState
from ml_mamba_jax.tokenizer import Tokenizer
from ml_mamba_jax.typing import Images, RowMask, Tokens


class Decoding(NamedTuple):
    """Between two tokens: the logits of the next one, the state after the last one, and how far the writing is."""

    logits: Float[Array, "b v"]
    state: MambaState
    finished: Bool[Array, "b"]
    position: Int[Array, ""]


@functools.partial(jax.jit, static_argnames="model")
def begin(
    model: MLMamba,
    params: dict,
    tokens: Tokens,
    lengths: Int[Array, "b"],
    images: Images | None = None,
    image_mask: RowMask | None = None,
    state: MambaState | None = None,
) -> Decoding:
    """Read prompts [b l], padded on the right beyond `lengths` [b]; `state` is what came before, if anything."""
    logits, state = model.apply(
        {"params": params},
        tokens,
        images=images,
        image_mask=image_mask,
        lengths=lengths,
        state=state,
        method="prefill",
    )
    return Decoding(logits, state, jnp.zeros(tokens.shape[0], bool), jnp.zeros((), jnp.int32))


@functools.partial(jax.jit, static_argnames=("model", "sampling", "stop_ids", "vocab_size"))
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
    logits = decoding.logits[:, :vocab_size]
    token = sample(jax.random.fold_in(key, decoding.position), logits, sampling)
    finished = decoding.finished
    for stop_id in stop_ids:
        finished = finished | (token == stop_id)
    logits, state = model.apply({"params": params}, token, decoding.state, method="step")
    state = jax.tree.map(
        lambda old, new: jnp.where(finished.reshape(1, -1, *[1] * (old.ndim - 2)), old, new), decoding.state, state
    )
    return token, Decoding(logits, state, finished, decoding.position + 1)


@functools.partial(jax.jit, static_argnames=("model", "max_new_tokens", "sampling", "stop_ids", "vocab_size"))
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
    """Continue prompts [b l], padded on the right beyond `lengths` [b]. One program: the loop runs on the device.

    Args:
        image_mask: rows that have an image, as in `MLMamba`.
        state: what came before, as in `MLMamba.prefill`.
        stop_ids: tokens that end a row. They are not part of its answer.
        vocab_size: tokens with ids from here on are never chosen. Default: the vocabulary of the config.

    Returns:
        The new tokens, int32 and 0 beyond the end of a row; their numbers; and the state after each row's last one.
    """
    vocab_size = vocab_size or model.config.language.vocab_size

    def unfinished(carry):
        decoding, _, _ = carry
        return (decoding.position < max_new_tokens) & ~jnp.all(decoding.finished)

    def write(carry):
        decoding, written, count = carry
        token, following = advance(
            model, params, decoding, key, sampling=sampling, stop_ids=stop_ids, vocab_size=vocab_size
        )
        token = jnp.where(following.finished, 0, token)
        written = lax.dynamic_update_index_in_dim(written, token, decoding.position, axis=1)
        return following, written, count + ~following.finished

    batch = tokens.shape[0]
    decoding = begin(model, params, tokens, lengths, images, image_mask, state)
    carry = (decoding, jnp.zeros((batch, max_new_tokens), jnp.int32), jnp.zeros(batch, jnp.int32))
    decoding, written, count = lax.while_loop(unfinished, write, carry)
    return written, count, decoding.state


def generate(
    model: MLMamba,
    params: dict,
    tokenizer: Tokenizer,
    prompts: Sequence[str | Sequence[Turn]],
    images: Sequence | None = None,
    *,
    max_new_tokens: int = 128,
    sampling: Sampling = Sampling(),  # noqa: B008, it is frozen
    seed: int = 0,
    stop_ids: Sequence[int] | None = None,
) -> list[str]:
    """Answer a batch of questions or conversations, each with an image or without.

    Args:
        prompts: a question, or the turns of a conversation that ends with a human turn; the marks of the config's prompt
            format are added here.
        images: for each prompt a file name, a `PIL.Image`, uint8 pixels [y x 3], or None.
        stop_ids: tokens that end an answer. Default: the end of a turn in the prompt format.

    Returns:
        The answers in the order of the prompts, without white space around them.

    Raises:
        InputError: no prompts, an image that cannot be read or that the model cannot see, a tokenizer of another model.
        NonFiniteError: the model computed NaN or infinity.
    """
    if isinstance(prompts, str):
        raise InputError("prompts: got one string, expected a list of questions; pass [question]")
    prompts = list(prompts)
    images = [None] * len(prompts) if images is None else list(images)
    if not prompts or len(images) != len(prompts):
        raise InputError(f"got {len(prompts)} prompts and {len(images)} images, expected as many of both, at least one")
    rows = [encode_turns(tokenizer, turns, model.config.prompt_format) for turns in prompts]
    written, counts, state = generate_tokens(
        model,
        params,
        *pad_rows(rows, tokenizer.eos_id),
        *stack_images(images, model.config),
        jax.random.key(seed),
        max_new_tokens=_at_least_one(max_new_tokens),
        sampling=sampling,
        stop_ids=_stop_ids(stop_ids, tokenizer, model.config),
        vocab_size=_vocab_size(tokenizer, model.config),
    )
    _check_finite(state)
    written, counts = np.asarray(written), np.asarray(counts)
    return [tokenizer.decode(row[:count].tolist()).strip() for row, count in zip(written, counts, strict=True)]


def stream(
    model: MLMamba,
    params: dict,
    tokenizer: Tokenizer,
    question: str | Sequence[Turn],
    image=None,
    *,
    max_new_tokens: int = 128,
    sampling: Sampling = Sampling(),  # noqa: B008, it is frozen
    seed: int = 0,
    stop_ids: Sequence[int] | None = None,
) -> Iterator[str]:
    """Yield the answer to one prompt piece by piece, in whole characters. Joined it is what `generate` returns."""
    answer = Answer(
        model,
        params,
        tokenizer,
        encode_turns(tokenizer, question, model.config.prompt_format),
        image,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        seed=seed,
        stop_ids=stop_ids,
    )
    yield from answer


class Answer:
    """One answer while it is written: iterate for its text. `ids` and `state` are what has been written so far."""

    def __init__(
        self,
        model: MLMamba,
        params: dict,
        tokenizer: Tokenizer,
        ids: Sequence[int],
        image=None,
        *,
        state: MambaState | None = None,
        max_new_tokens: int,
        sampling: Sampling,
        seed: int,
        stop_ids: Sequence[int] | None,
    ):
        """Reads the prompt `ids`. The arguments are those of `generate`, for one row, and `state`: what came before."""
        self.ids: list[int] = []
        self._tokenizer = tokenizer
        self._max_new_tokens = _at_least_one(max_new_tokens)
        self._advance = functools.partial(
            advance,
            model,
            params,
            key=jax.random.key(seed),
            sampling=sampling,
            stop_ids=_stop_ids(stop_ids, tokenizer, model.config),
            vocab_size=_vocab_size(tokenizer, model.config),
        )
        self._decoding = begin(
            model, params, *pad_rows([ids], tokenizer.eos_id), *stack_images([image], model.config), state
        )

    @property
    def state(self) -> MambaState:
        """The state after the last token that was written."""
        return self._decoding.state

    @property
    def text(self) -> str:
        return self._tokenizer.decode(self.ids).strip()

    def __iter__(self) -> Iterator[str]:
        pieces = WholeCharacters(self._tokenizer)
        while len(self.ids) < self._max_new_tokens:
            token, self._decoding = self._advance(decoding=self._decoding)
            if self._decoding.finished[0]:
                break
            self.ids.append(int(token[0]))
            if piece := pieces.push(self.ids[-1]):
                yield piece
        _check_finite(self.state)
        if piece := pieces.flush():
            yield piece


class WholeCharacters:
    """Turns token ids into text while they come. A token may hold part of a character: it waits for the rest.

    White space waits for what follows, so that the pieces join to the stripped text.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._space: str | None = None  # None before the first visible character

    def push(self, token: int) -> str:
        """The text that is certain with this token; may be empty."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        if text.endswith("\ufffd"):
            return ""
        self._ids = []
        return self._visible(text)

    def flush(self) -> str:
        """What is left at the end: bytes that never became a character, as U+FFFD."""
        text, self._ids = self._tokenizer.decode(self._ids), []
        return self._visible(text)

    def _visible(self, text: str) -> str:
        text = text.lstrip() if self._space is None else self._space + text
        visible = text.rstrip()
        if visible or self._space is not None:
            self._space = text[len(visible) :]
        return visible


class Chat:
    """A conversation in several turns, about an image or about nothing in particular.

        chat = Chat(model, params, tokenizer)
        chat.ask("What is in the picture?", "cat.png")
        chat.ask("What colour is it?")

    Only the new turn is read each time: what came before is in the recurrent state, whose size never grows. The answers
    are those of the whole conversation read afresh.
    """

    def __init__(self, model: MLMamba, params: dict, tokenizer: Tokenizer):
        _vocab_size(tokenizer, model.config)
        self._end_id = tokenizer.end_id(model.config.prompt_format)
        self._model, self._params, self._tokenizer = model, params, tokenizer
        self.reset()

    def reset(self) -> None:
        """Forget everything: the next question starts a conversation."""
        self.turns: list[Turn] = []
        self.answer_ids: list[int] = []
        """Tokens of the last answer."""
        self.state: MambaState | None = None
        """After the last token of the last answer; None before the first question."""

    def ask(self, text: str, image=None, **options) -> str:
        """The answer to `text`. The arguments are those of `stream`."""
        return "".join(self.stream(text, image, **options))

    def stream(
        self,
        text: str,
        image=None,
        *,
        max_new_tokens: int = 128,
        sampling: Sampling = Sampling(),  # noqa: B008, it is frozen
        seed: int = 0,
        stop_ids: Sequence[int] | None = None,
    ) -> Iterator[str]:
        """Yield the answer piece by piece. One that is abandoned half-way stays in the conversation as far as it got.

        Args:
            image: file name, `PIL.Image` or uint8 pixels [y x 3]; only with the first question.

        Raises:
            InputError: an image after the first question, or one that cannot be read. NonFiniteError: NaN or infinity.
        """
        if image is not None and self.turns:
            raise InputError(
                "image: got one in the middle of a conversation, expected it with the first question; call reset first"
            )
        turns = [*self.turns, Turn("human", text)]
        ids = self._tokenizer.encode(render(turns, self._model.config.prompt_format)[-1].text)
        if self.turns:  # the answer before ends with the end of a turn, which was at best chosen, but never read
            ids = [self._end_id, *ids]
        answer = Answer(
            self._model,
            self._params,
            self._tokenizer,
            ids,
            image,
            state=self.state,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            seed=seed,
            stop_ids=stop_ids,
        )
        try:
            yield from answer
        finally:
            self.turns = [*turns, Turn("gpt", answer.text)]
            self.answer_ids, self.state = answer.ids, answer.state


def _stop_ids(stop_ids: Sequence[int] | None, tokenizer: Tokenizer, config: MLMambaConfig) -> tuple[int, ...]:
    return (tokenizer.end_id(config.prompt_format),) if stop_ids is None else tuple(int(i) for i in stop_ids)


def _vocab_size(tokenizer: Tokenizer, config: MLMambaConfig) -> int:
    """Ids that can be chosen: those of the tokenizer, all of which the model must know."""
    if tokenizer.vocab_size > config.language.vocab_size:
        raise InputError(
            f"tokenizer: got {tokenizer.vocab_size} entries, expected at most the {config.language.vocab_size} "
            "of the model; use the tokenizer it was trained with"
        )
    return tokenizer.vocab_size


def _at_least_one(max_new_tokens: int) -> int:
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens: got {max_new_tokens}, expected at least 1")
    return max_new_tokens


def _check_finite(state: MambaState) -> None:
    """A NaN or infinity anywhere in the model reaches the state and stays there."""
    if not jnp.isfinite(state.ssm).all():
        raise NonFiniteError(
            "generate: got NaN or infinity inside the model, expected finite numbers; "
            "check the parameters, or compute in float32"
        )
