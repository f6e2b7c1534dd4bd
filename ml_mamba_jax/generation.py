"""Text from a model about images and without: whole batches, piece by piece, or as probabilities.

`generate` answers a batch, `stream` yields one answer as it is written, `answer_probabilities` weighs given answers;
`conversation.Chat` keeps the recurrent state from turn to turn. All of them stand on `decoding`, which knows only token ids.
"""

import functools
from collections.abc import Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from ml_mamba_jax.answer import Answer, checked_vocab_size, random_key, writing_options
from ml_mamba_jax.batching import encode_prompts, encode_turns, list_of_images, one_for_each, stack_images
from ml_mamba_jax.decoding import (
    SHORTEST_BUCKET,
    bucket,
    check_finite,
    checked_max_new_tokens,
    nothing_seen,
    pad_rows,
    read,
    write_in_place,
)
from ml_mamba_jax.errors import InputError, NonFiniteError
from ml_mamba_jax.model import MLMamba
from ml_mamba_jax.prompt import Turn
from ml_mamba_jax.sampling import Sampling
from ml_mamba_jax.state import MambaState, check_is_state, fork
from ml_mamba_jax.text_stream import TextStream
from ml_mamba_jax.timing import Timing
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
    check_finite("image_state", state)
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
    prompts: Sequence[str | Sequence[Turn]] | None,
    images=None,
    *,
    state: MambaState | None = None,
    max_new_tokens: int = 128,
    sampling: Sampling = Sampling(),  # noqa: B008, it is frozen
    seed: int = 0,
    stop_ids: Sequence[int] | None = None,
    stop_strings: Sequence[str] | None = (),
    timing: Timing | None = None,
) -> list[str]:
    """Answer a batch of questions or conversations, each with an image or without.

    Args:
        prompts: a question, or the turns of a conversation that ends with a human turn; the marks of the config's prompt
            format are added here. None: caption the images without being asked, as a model does that learnt captions.
        images: for each prompt a file name, a `PIL.Image`, uint8 pixels [y x 3], or None. For one prompt it may stand alone.
        state: what comes before the prompts, such as `image_state`: of one row for all of them, or one row for each.
        stop_ids: tokens that end an answer. Default: the end of a turn in the prompt format.
        stop_strings: texts that end an answer and are no part of it. Looked for every 32 tokens.
        timing: is filled in with the time to the first token, of compiling, and of all.

    Returns:
        The answers in the order of the prompts, without white space around them.

    Raises:
        InputError: no prompts, an image that cannot be read or that the model cannot see, a tokenizer or a state of
            another model, options that cannot be used.
        NonFiniteError: the model computed NaN or infinity.
    """
    timing = Timing() if timing is None else timing
    options = writing_options(tokenizer, model.config, sampling, stop_ids)
    left = checked_max_new_tokens(max_new_tokens)
    rows, images, state = _batch(model, tokenizer, prompts, images, state)
    pieces = [TextStream(tokenizer, stop_strings) for _ in rows]
    key = random_key(seed)
    # Only the host knows stop strings, so it looks at every block of tokens for them.
    block = SHORTEST_BUCKET if pieces[0].looks_for_stops else bucket(left)
    texts = ["" for _ in rows]
    with timing.running(len(rows)):
        seen = nothing_seen(model, len(rows), sampling)
        decoding = read(
            model,
            params,
            *pad_rows(rows, tokenizer.eos_id),
            *stack_images(images, model.config),
            state=state,
            seen=seen,
        )
        jax.block_until_ready(decoding.logits)
        timing.came(0)
        while left > 0:
            written, counts, decoding = write_in_place(
                model, params, decoding, key, min(left, block), capacity=block, **options
            )
            left -= block
            finished, written, counts = map(np.array, (decoding.finished, written, counts))
            timing.came(int(counts.sum()))
            for i, tokens in enumerate(written):
                for token in tokens[: counts[i]].tolist():
                    texts[i] += pieces[i].push(token)
                    if pieces[i].stopped:
                        finished[i] = True
                        break
            if finished.all():
                break
            decoding = decoding._replace(finished=jnp.asarray(finished))
        check_finite("generate", decoding.state, decoding.finite)
    return [text + stream.flush() for text, stream in zip(texts, pieces, strict=True)]


def answer_probabilities(
    model: MLMamba,
    params: dict,
    tokenizer: Tokenizer,
    prompts: Sequence[str | Sequence[Turn]],
    images=None,
    *,
    answers: Iterable[str],
    state: MambaState | None = None,
) -> Float[np.ndarray, "prompts answers"]:
    """How probable each of `answers` is as the beginning of the answer; the rows add up to 1.

    The probabilities of the answers' first tokens among each other, after the whole prompt: how POPE ("Yes", "No") and
    VSR ("True", "False") are scored. The other arguments are those of `generate`.

    Raises:
        InputError: as `generate`, and answers that are empty or begin with the same token.
    """
    checked_vocab_size(tokenizer, model.config)
    texts = [] if isinstance(answers, str) or not isinstance(answers, Iterable) else list(answers)
    if len(texts) < 2 or not all(isinstance(text, str) and text for text in texts):
        got = answers if isinstance(answers, str) else texts or answers
        raise InputError(f"answers: got {got!r}, expected a list of at least two texts, none of them empty")
    answers, first = texts, [tokenizer.encode(text)[0] for text in texts]
    for i, token in enumerate(first):
        if token in first[:i]:
            same = answers[first.index(token)]
            raise InputError(
                f"answers: got {same!r} and {answers[i]!r}, which begin with the same token; expected different ones"
            )
    rows, images, state = _batch(model, tokenizer, prompts, images, state)
    tokens = pad_rows(rows, tokenizer.eos_id)
    decoding = read(model, params, *tokens, *stack_images(images, model.config), state=state)
    check_finite("answer_probabilities", decoding.state)
    logits = np.asarray(decoding.logits)[:, first]
    likely = np.exp(logits - logits.max(axis=-1, keepdims=True))
    probabilities = likely / likely.sum(axis=-1, keepdims=True)
    if not np.isfinite(probabilities).all():
        raise NonFiniteError("answer_probabilities: got NaN or infinity among the logits; check the parameters")
    return probabilities


def _batch(model, tokenizer, prompts, images, state):
    """(token ids of the prompts, an image or None for each, a row of state for each or None)"""
    if prompts is None:
        images = list_of_images(images)
        rows = [[] for _ in images]
    else:
        rows = encode_prompts(tokenizer, prompts, model.config.prompt_format)
        images = one_for_each(images, len(rows))
    if state is not None:
        check_is_state(state)
        if state.batch_size == 1:
            state = fork(state, len(rows))
    return rows, images, state


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
    stop_strings: Sequence[str] | None = (),
    timing: Timing | None = None,
) -> Iterator[str]:
    """Yield the answer to one prompt piece by piece, in whole characters. Joined it is what `generate` returns."""
    timing = Timing() if timing is None else timing
    checked_vocab_size(tokenizer, model.config)
    ids = encode_turns(tokenizer, question, model.config.prompt_format)
    with timing.running():
        yield from Answer(
            model,
            params,
            tokenizer,
            ids,
            image,
            state=state,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            seed=seed,
            stop_ids=stop_ids,
            stop_strings=stop_strings,
            timing=timing,
        )
