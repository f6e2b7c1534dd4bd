"""Text from a model about images and without: whole batches, piece by piece, in conversations, or as probabilities.

`generate` answers a batch, `stream` yields one answer as it is written, `Chat` keeps the recurrent state from turn to
turn, `answer_probabilities` weighs given answers. All of them stand on `decoding`, which knows only token ids.
"""

import copy
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from ml_mamba_jax.batching import encode_turns, stack_images
from ml_mamba_jax.config import MLMambaConfig
from ml_mamba_jax.decoding import Decoding, check_max_new_tokens, generate_tokens, nothing_seen, pad_rows, read, write
from ml_mamba_jax.errors import InputError, NonFiniteError
from ml_mamba_jax.model import MLMamba
from ml_mamba_jax.prompt import Turn, render
from ml_mamba_jax.sampling import Sampling
from ml_mamba_jax.state import MambaState, fork
from ml_mamba_jax.text_stream import TextStream, text_of
from ml_mamba_jax.tokenizer import Tokenizer


def image_state(model: MLMamba, params: dict, image) -> MambaState:
    """The state of one row after an image and before any text: encode once, ask many questions from it.

        state = image_state(model, params, "cat.png")
        generate(model, params, tokenizer, ["What is it?", "What colour is it?"], state=state)

    Args:
        image: as in `generate`.

    Raises:
        InputError: an image that cannot be read or that the model cannot see. NonFiniteError: NaN or infinity.
    """
    pixels, _ = stack_images([image], model.config)
    if pixels is None:
        raise InputError("image: got None, expected a file name, PIL.Image or uint8 pixels [y x 3]")
    state = _state_after_images(model, params, pixels)
    _check_finite(state)
    return state


@functools.partial(jax.jit, static_argnames="model")
def _state_after_images(model, params, pixels) -> MambaState:
    batch = next(iter(pixels.values())).shape[0]
    no_text = jnp.zeros((batch, 0), jnp.int32)
    return model.apply({"params": params}, no_text, images=pixels, method="prefill")[1]


def generate(
    model: MLMamba,
    params: dict,
    tokenizer: Tokenizer,
    prompts: Sequence[str | Sequence[Turn]],
    images: Sequence | None = None,
    *,
    state: MambaState | None = None,
    max_new_tokens: int = 128,
    sampling: Sampling = Sampling(),  # noqa: B008, it is frozen
    seed: int = 0,
    stop_ids: Sequence[int] | None = None,
    stop_strings: Sequence[str] = (),
) -> list[str]:
    """Answer a batch of questions or conversations, each with an image or without.

    Args:
        prompts: a question, or the turns of a conversation that ends with a human turn; the marks of the config's prompt
            format are added here.
        images: for each prompt a file name, a `PIL.Image`, uint8 pixels [y x 3], or None.
        state: what comes before the prompts, such as `image_state`: of one row for all of them, or one row for each.
        stop_ids: tokens that end an answer. Default: the end of a turn in the prompt format.
        stop_strings: texts that end an answer and are no part of it.

    Returns:
        The answers in the order of the prompts, without white space around them.

    Raises:
        InputError: no prompts, an image that cannot be read or that the model cannot see, a tokenizer or a state of
            another model.
        NonFiniteError: the model computed NaN or infinity.
    """
    rows, images, state = _batch(model, tokenizer, prompts, images, state)
    TextStream(tokenizer, stop_strings)  # refuses what it cannot look for before the work begins
    written, counts, state = generate_tokens(
        model,
        params,
        *pad_rows(rows, tokenizer.eos_id),
        *images,
        jax.random.key(seed),
        state=state,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop_ids=_stop_ids(stop_ids, tokenizer, model.config),
        vocab_size=_vocab_size(tokenizer, model.config),
    )
    _check_finite(state)
    written, counts = np.asarray(written), np.asarray(counts)
    return [text_of(row[:count].tolist(), tokenizer, stop_strings) for row, count in zip(written, counts, strict=True)]


def answer_probabilities(
    model: MLMamba,
    params: dict,
    tokenizer: Tokenizer,
    prompts: Sequence[str | Sequence[Turn]],
    images: Sequence | None = None,
    *,
    answers: Sequence[str],
    state: MambaState | None = None,
) -> Float[np.ndarray, "prompts answers"]:
    """How probable each of `answers` is as the beginning of the answer; the rows add up to 1.

    The probabilities of the answers' first tokens among each other, after the whole prompt: how POPE ("Yes", "No") and
    VSR ("True", "False") are scored. The other arguments are those of `generate`.

    Raises:
        InputError: as `generate`, and answers that are empty or begin with the same token.
    """
    first = [tokenizer.encode(answer)[:1] for answer in answers]
    if isinstance(answers, str) or len(answers) < 2 or not all(first):
        raise InputError(f"answers: got {answers!r}, expected a list of at least two texts, none of them empty")
    for i, token in enumerate(first):
        if token in first[:i]:
            same = answers[first.index(token)]
            raise InputError(
                f"answers: got {same!r} and {answers[i]!r}, which begin with the same token; expected different ones"
            )
    rows, images, state = _batch(model, tokenizer, prompts, images, state)
    _vocab_size(tokenizer, model.config)
    decoding = read(model, params, *pad_rows(rows, tokenizer.eos_id), *images, state=state)
    _check_finite(decoding.state)
    probabilities = np.asarray(jax.nn.softmax(decoding.logits[:, np.concatenate(first)], axis=-1))
    if not np.isfinite(probabilities).all():
        raise NonFiniteError("answer_probabilities: got NaN or infinity among the logits; check the parameters")
    return probabilities


def _batch(model, tokenizer, prompts, images, state):
    """(token ids of the prompts, pixels and mask, a row of state for each prompt or None)"""
    if isinstance(prompts, str):
        raise InputError("prompts: got one string, expected a list of questions; pass [question]")
    prompts = list(prompts)
    images = [None] * len(prompts) if images is None else list(images)
    if not prompts or len(images) != len(prompts):
        raise InputError(f"got {len(prompts)} prompts and {len(images)} images, expected as many of both, at least one")
    rows = [encode_turns(tokenizer, turns, model.config.prompt_format) for turns in prompts]
    if state is not None and state.batch_size == 1:
        state = fork(state, len(prompts))
    return rows, stack_images(images, model.config), state


def stream(
    model: MLMamba,
    params: dict,
    tokenizer: Tokenizer,
    question: str | Sequence[Turn],
    image=None,
    *,
    state: MambaState | None = None,
    max_new_tokens: int = 128,
    sampling: Sampling = Sampling(),  # noqa: B008, it is frozen
    seed: int = 0,
    stop_ids: Sequence[int] | None = None,
    stop_strings: Sequence[str] = (),
) -> Iterator[str]:
    """Yield the answer to one prompt piece by piece, in whole characters. Joined it is what `generate` returns."""
    answer = Answer(
        model,
        params,
        tokenizer,
        encode_turns(tokenizer, question, model.config.prompt_format),
        image,
        state=state,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        seed=seed,
        stop_ids=stop_ids,
        stop_strings=stop_strings,
    )
    yield from answer


class Answer:
    """One answer while it is written: iterate for its text. `ids` and `text` are what was handed out so far.

    The device writes the first token alone, then `BLOCK` at a time, which are handed out one by one. Who stops in
    between gets the state after the last one that was handed out.
    """

    BLOCK = 8

    def __init__(
        self,
        model: MLMamba,
        params: dict,
        tokenizer: Tokenizer,
        ids: Sequence[int],
        image=None,
        *,
        state: MambaState | None = None,
        before: Sequence[int] = (),
        max_new_tokens: int,
        sampling: Sampling,
        seed: int,
        stop_ids: Sequence[int] | None,
        stop_strings: Sequence[str] = (),
    ):
        """Reads the prompt `ids`.

        The arguments are those of `generate`, for one row. `before`: the tokens that `state` has read, which a
        repetition penalty counts.
        """
        check_max_new_tokens(max_new_tokens)
        self.ids: list[int] = []
        self.text = ""
        self._max_new_tokens = max_new_tokens
        self._pieces = TextStream(tokenizer, stop_strings)
        self._write = functools.partial(
            write,
            model,
            params,
            key=jax.random.key(seed),
            capacity=self.BLOCK,
            sampling=sampling,
            stop_ids=_stop_ids(stop_ids, tokenizer, model.config),
            vocab_size=_vocab_size(tokenizer, model.config),
        )
        seen = nothing_seen(model, 1, sampling)
        if seen is not None:
            already = np.zeros(seen.shape, bool)  # by NumPy: another number of tokens compiles nothing
            already[0, list(before)] = True
            seen = jnp.asarray(already)
        rows, pixels = pad_rows([ids], tokenizer.eos_id), stack_images([image], model.config)
        self._decoding: Decoding = read(model, params, *rows, *pixels, state=state, seen=seen)

    @property
    def state(self) -> MambaState:
        """Once the iteration has ended or was closed: the state after the last token that was handed out."""
        return self._decoding.state

    def __iter__(self) -> Iterator[str]:
        wanted = 1
        while len(self.ids) < self._max_new_tokens:
            wanted = min(wanted, self._max_new_tokens - len(self.ids))
            before, start = self._decoding, len(self.ids)
            tokens, count, after = self._write(before, limit=wanted)
            tokens, count = np.asarray(tokens)[0], int(count[0])  # here an interrupt leaves everything as it was
            try:
                for token in tokens[:count].tolist():
                    self.ids.append(token)
                    yield from self._shown(self._pieces.push(token))
                    if self._pieces.stopped:
                        break
            finally:
                used = len(self.ids) - start
                self._decoding = after if used == count else self._write(before, limit=used)[-1]
            if count < wanted or self._pieces.stopped:
                break
            wanted = self.BLOCK
        _check_finite(self.state)
        yield from self._shown(self._pieces.flush())

    def _shown(self, piece: str) -> Iterator[str]:
        if piece:
            self.text += piece
            yield piece


class Chat:
    """A conversation in several turns, about images or about nothing in particular.

        chat = Chat(model, params, tokenizer)
        chat.ask("What is in the picture?", "cat.png")
        chat.ask("What colour is it?")
        chat.ask("And what is in this one?", "dog.png")

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
        self.ids: list[int] = []
        """All tokens of the conversation so far."""
        self.state: MambaState | None = None
        """After the last token of the last answer; None before the first question."""

    def fork(self) -> "Chat":
        """Another conversation that goes on from here; what is said in one does not reach the other."""
        other = copy.copy(self)
        other.turns, other.ids, other.answer_ids = list(self.turns), list(self.ids), list(self.answer_ids)
        return other

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
        stop_strings: Sequence[str] = (),
    ) -> Iterator[str]:
        """Yield the answer piece by piece. One that is abandoned half-way stays in the conversation as far as it got.

        A stop string is no part of the answer, but the conversation has read it.

        Args:
            image: file name, `PIL.Image` or uint8 pixels [y x 3]; its visual tokens stand before the question.

        Raises:
            InputError: an image that cannot be read or that the model cannot see. NonFiniteError: NaN or infinity.
        """
        turns = [*self.turns, Turn("human", text)]
        ids, state = self._tokenizer.encode(render(turns, self._model.config.prompt_format)[-1].text), self.state
        end = [self._end_id] if self.turns else []  # of the answer before: at best it was chosen, but never read
        if image is not None and end:
            state = read(self._model, self._params, *pad_rows([end], self._end_id), state=state).state
            before = [*self.ids, *end]
        else:
            ids, before = [*end, *ids], self.ids
        answer = Answer(
            self._model,
            self._params,
            self._tokenizer,
            ids,
            image,
            state=state,
            before=before,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            seed=seed,
            stop_ids=stop_ids,
            stop_strings=stop_strings,
        )
        try:
            yield from answer
        finally:
            self.turns = [*turns, Turn("gpt", answer.text)]
            self.ids = [*before, *ids, *answer.ids]
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


def _check_finite(state: MambaState) -> None:
    """A NaN or infinity anywhere in the model reaches the state and stays there."""
    if not jnp.isfinite(state.ssm).all():
        raise NonFiniteError(
            "generate: got NaN or infinity inside the model, expected finite numbers; "
            "check the parameters, or compute in float32"
        )
