"""From a record to what the model is fed: token ids, which of them are targets, and pixels; and from samples to a batch."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from ml_mamba_jax.config import MLMambaConfig
from ml_mamba_jax.data.records import Record
from ml_mamba_jax.errors import InputError
from ml_mamba_jax.image import prepare_images, read_image, stack_pixels
from ml_mamba_jax.prompt import Piece, Turn, render, render_caption
from ml_mamba_jax.tokenizer import Tokenizer

Form = Literal["chat", "caption"]
"""What of a conversation is learnt: its answers, or the caption of an image alone, as in the alignment stage."""

NORMALIZED_BYTES = 3
"""A tokenizer may bring a text into Unicode's normal form NFC before it counts bytes, and make up to three of one."""


class Sample(NamedTuple):
    """One row: `tokens` int32 [l], `is_target` bool [l] on the tokens to learn, `pixels` uint8 [y x 3] by encoder or None."""

    tokens: np.ndarray
    is_target: np.ndarray
    pixels: dict[str, np.ndarray] | None


class Batch(NamedTuple):
    """What a training step takes, all arrays with a leading batch axis.

    `tokens` int32 [b l], padded on the right; `is_target` bool [b l]; `lengths` int32 [b]; `images` uint8 [b y x 3] by encoder;
    `image_mask` bool [b], false for text alone, or None where every row has an image.
    """

    tokens: np.ndarray
    is_target: np.ndarray
    lengths: np.ndarray
    images: dict[str, np.ndarray]
    image_mask: np.ndarray | None


def tokenize(
    turns: Sequence[Turn],
    tokenizer: Tokenizer,
    max_tokens: int,
    name: str,
    *,
    prompt_format: str = "zephyr",
    form: Form = "chat",
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and target mask of a conversation, each turn tokenised on its own, cut after `max_tokens`.

    `form` "chat": human turns are read, gpt turns learnt. "caption": the human turn is left out, the gpt turn learnt whole.

    Raises:
        InputError: no target within `max_tokens`, or more than one gpt turn for a caption; names the record.
    """
    pieces = pieces_of(turns, name, prompt_format, form)
    tokens, is_target = tokenizer.encode_pieces(pieces)
    total = len(tokens)
    tokens, is_target = np.asarray(tokens[:max_tokens], np.int32), np.asarray(is_target[:max_tokens], bool)
    if not is_target.any():
        raise InputError(
            f"{name}: got no target among the first {len(tokens)} of {total} tokens, expected an answer to learn; "
            "raise --data.max-tokens or shorten the question"
        )
    return tokens, is_target


def pieces_of(turns: Sequence[Turn], name: str, prompt_format: str, form: Form) -> list[Piece]:
    """The pieces of a conversation that the model reads. Raises InputError as `check_form`."""
    check_form(turns, form, name)
    return render_caption(turns[-1].text, prompt_format) if form == "caption" else render(turns, prompt_format)


def check_form(turns: Sequence[Turn], form: Form, name: str) -> None:
    """Raise InputError, calling the record `name`, for a conversation that is no caption where one is to be learnt."""
    if form == "caption" and len(turns) != 2:
        raise InputError(
            f"{name}: got {len(turns)} turns, expected a human turn and a caption; learn conversations with --data.form chat"
        )


def has_target(
    turns: Sequence[Turn], tokenizer: Tokenizer, max_tokens: int, *, prompt_format: str = "zephyr", form: Form = "chat"
) -> bool:
    """Whether `tokenize` finds a target within `max_tokens`. Most texts are so short that they need not be tokenised."""
    before = [] if form == "caption" else render(turns[:1], prompt_format)
    n_bytes = sum(len(piece.text.encode()) for piece in before)
    if NORMALIZED_BYTES * n_bytes < max_tokens:  # a token is at least one byte
        return True
    return len(tokenizer.encode_pieces(before)[0]) < max_tokens


def make_sample(
    record: Record, tokenizer: Tokenizer, config: MLMambaConfig, max_tokens: int, form: Form = "chat"
) -> Sample:
    """Raises InputError, naming the record, for an image that cannot be decoded or a conversation without targets."""
    tokens, is_target = tokenize(
        record.turns, tokenizer, max_tokens, record.id, prompt_format=config.prompt_format, form=form
    )
    pixels = None
    if record.image is not None and config.vision:
        pixels = prepare_images(read_image(record.image, record.id), config, record.id)
    return Sample(tokens, is_target, pixels)


def collate(samples: Sequence[Sample], config: MLMambaConfig, pad_id: int, length: int) -> Batch:
    """Stack rows of different lengths, padded to `length` tokens. Rows without an image get black pixels and no mask."""
    shape = (len(samples), length)
    tokens, is_target = np.full(shape, pad_id, np.int32), np.zeros(shape, bool)
    for row, sample in enumerate(samples):
        tokens[row, : len(sample.tokens)] = sample.tokens
        is_target[row, : len(sample.tokens)] = sample.is_target
    has_image = np.asarray([sample.pixels is not None for sample in samples], bool)
    return Batch(
        tokens=tokens,
        is_target=is_target,
        lengths=np.asarray([len(sample.tokens) for sample in samples], np.int32),
        images=stack_pixels([sample.pixels for sample in samples], config),
        image_mask=None if has_image.all() else has_image,
    )
