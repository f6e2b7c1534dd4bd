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

    `tokens` int32 [b l], padded on the right; `is_target` bool [b l]; `lengths` int32 [b], text tokens; `images` uint8 [b y x 3] by
    encoder, none where no row has an image; `image_mask` bool [b], false for text alone, or None where every row has an image.

    In a packed batch rows hold several sequences: `segment_ids` int32 [b l] numbers them, negative for padding. Positions of visual
    tokens are part of the row: `image_starts` int32 [b m] says where those of each image begin, negative for none; `images` are
    [b m y x 3].
    """

    tokens: np.ndarray
    is_target: np.ndarray
    lengths: np.ndarray
    images: dict[str, np.ndarray]
    image_mask: np.ndarray | None
    segment_ids: np.ndarray | None = None
    image_starts: np.ndarray | None = None


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


def collate(
    samples: Sequence[Sample | None],
    config: MLMambaConfig,
    pad_id: int,
    length: int,
    *,
    has_image: bool | None = None,
) -> Batch:
    """Stack rows of different lengths, padded to `length` tokens; None is a row without anything to learn.

    Rows without an image get black pixels and a false mask. `has_image` false leaves the images out.
    """
    shape = (len(samples), length)
    tokens, is_target = np.full(shape, pad_id, np.int32), np.zeros(shape, bool)
    lengths, mask = np.zeros(len(samples), np.int32), np.zeros(len(samples), bool)
    for row, sample in enumerate(samples):
        if sample is None:
            mask[row] = True  # a black image, seen in vain: the batch keeps the form of the others
            continue
        lengths[row], mask[row] = len(sample.tokens), sample.pixels is not None
        tokens[row, : lengths[row]] = sample.tokens
        is_target[row, : lengths[row]] = sample.is_target
    pixels = [None if sample is None else sample.pixels for sample in samples]
    images = {} if has_image is False else stack_pixels(pixels, config)
    return Batch(tokens, is_target, lengths, images, None if mask.all() or not images else mask)


def collate_packed(
    rows: Sequence[Sequence[Sample]], config: MLMambaConfig, pad_id: int, length: int, image_slots: int
) -> Batch:
    """Rows of several samples one after the other, each its visual tokens and then its text, padded to `length` positions.

    Raises:
        InputError: samples that do not fit, or more images in a row than `image_slots`.
    """
    shape, n_visual = (len(rows), length), config.n_visual_tokens if config.vision else 0
    tokens, is_target = np.full(shape, pad_id, np.int32), np.zeros(shape, bool)
    segment_ids = np.full(shape, -1, np.int32)
    lengths, starts = np.zeros(len(rows), np.int32), np.full((len(rows), image_slots), -1, np.int32)
    pixels: list[dict[str, np.ndarray] | None] = []
    for row, samples in enumerate(rows):
        at, of_row = 0, [sample.pixels for sample in samples if sample.pixels is not None]
        size = sum(len(sample.tokens) for sample in samples) + n_visual * len(of_row)
        if size > length or len(of_row) > image_slots:
            raise InputError(
                f"packed row: got {size} positions and {len(of_row)} images, expected at most {length} and {image_slots}"
            )
        starts_of_row = iter(range(image_slots))
        for number, sample in enumerate(samples):
            begin = at
            if sample.pixels is not None:
                starts[row, next(starts_of_row)] = at
                at += n_visual
            end = at + len(sample.tokens)
            tokens[row, at:end], is_target[row, at:end] = sample.tokens, sample.is_target
            segment_ids[row, begin:end] = number
            at, lengths[row] = end, lengths[row] + len(sample.tokens)
        pixels += [*of_row, *[None] * (image_slots - len(of_row))]
    if not image_slots:
        return Batch(tokens, is_target, lengths, {}, None, segment_ids)
    images = {name: a.reshape(len(rows), image_slots, *a.shape[1:]) for name, a in stack_pixels(pixels, config).items()}
    return Batch(tokens, is_target, lengths, images, None, segment_ids, starts)


def n_images(batch: Batch) -> int:
    """Images in a batch, without the black ones that fill up."""
    if not batch.images:
        return 0
    if batch.image_starts is not None:
        return int((batch.image_starts >= 0).sum())
    with_record = batch.lengths > 0
    return int((with_record if batch.image_mask is None else with_record & batch.image_mask).sum())


def n_positions(batch: Batch, config: MLMambaConfig) -> int:
    """Tokens that a batch makes a model read, visual ones and text, without padding."""
    return int(batch.lengths.sum()) + n_images(batch) * config.n_visual_tokens
