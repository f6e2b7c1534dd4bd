"""What a run reads: records, the tokenizer, and batches of both."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from ml_mamba_jax.config import MLMambaConfig
from ml_mamba_jax.data import builders, llava
from ml_mamba_jax.data.loader import BatchStream, batches, make_order
from ml_mamba_jax.data.order import Order, buckets
from ml_mamba_jax.data.records import Record
from ml_mamba_jax.data.source import RecordSource, splits_of
from ml_mamba_jax.errors import InputError
from ml_mamba_jax.prompt import render
from ml_mamba_jax.tokenizer import Tokenizer
from ml_mamba_jax.training.config import DataConfig, StageConfig, TrainConfig
from ml_mamba_jax.training.initial import tokenizer_of

TOKENIZER_RECORDS = 4000
"""Records, spread over the training split, that a tokenizer is trained on."""


def open_data(data: DataConfig) -> dict[str, RecordSource]:
    """The splits of the data set, prepared on disk if they were not: "train", and "test" where there is one."""
    if data.prepared is not None:
        return {split: RecordSource.open(data.prepared, split) for split in splits_of(data.prepared)}
    if data.json_file is None and not data.digits:
        raise InputError(
            "data: got no records to learn from; pass --data.prepared FOLDER, which python -m ml_mamba_jax.data.prepare "
            "wrote, or --data.json-file FILE"
        )
    if data.json_file is None:
        builder = builders.prepare_digits(data.folder, data.train_scenes, data.test_scenes)
    else:
        images = data.image_folder or llava.json_file(data.json_file).parent
        builder = builders.prepare_llava(
            data.folder, data.json_file, images, max_bad=data.max_bad, any_suffix=data.any_suffix
        )
    return {split: RecordSource(builder, split) for split in builder.info.splits}


def open_tokenizer(config: TrainConfig, folder: Path, source: Sequence[Record], resumed_step: int) -> Tokenizer:
    """The recipe's tokenizer, or one trained on the training text; a resumed run keeps its own."""
    vocab_size, prompt_format = config.model.language.vocab_size, config.model.prompt_format
    if resumed_step:
        return Tokenizer.from_pretrained(folder)
    if source_of_tokenizer := config.tokenizer or tokenizer_of(config.init):
        tokenizer = Tokenizer.from_pretrained(source_of_tokenizer)
    else:
        records = (source[i] for i in range(0, len(source), -(-len(source) // TOKENIZER_RECORDS)))
        texts = (piece.text for record in records for piece in render(record.turns, prompt_format))
        tokenizer = Tokenizer.train(texts, vocab_size, prompt_format)
    if tokenizer.vocab_size > vocab_size:
        raise InputError(
            f"tokenizer: got {tokenizer.vocab_size} entries, expected at most the model's {vocab_size}; "
            f"pass --model.language.vocab-size {tokenizer.vocab_size}"
        )
    tokenizer.end_id(prompt_format)  # only for its check
    return tokenizer


def fingerprints(
    config: TrainConfig, tokenizer: Tokenizer, data: Sequence[Mapping[str, RecordSource]]
) -> dict[str, str]:
    """What tells the tokenizer of a run, and each split of each of its stages, from others."""
    digest = hashlib.sha256(tokenizer.backend.to_str().encode()).hexdigest()[:12]
    found = {"tokenizer": f"{tokenizer.vocab_size} entries {digest}"}
    for stage, splits in zip(config.stages, data, strict=True):
        found |= {f"{stage.name}.{split}": source.fingerprint() for split, source in splits.items()}
    return found


def open_order(
    stage: StageConfig, model: MLMambaConfig, source: RecordSource, tokenizer: Tokenizer, seed: int
) -> Order:
    """Which records make up which batch of a stage."""
    data = stage.data
    return make_order(
        source,
        tokenizer,
        model,
        batch_size=stage.batch_size,
        max_tokens=data.max_tokens,
        seed=seed,
        form=data.form,
        batching=data.batching,
        n_buckets=data.buckets,
        row_length=data.row_length,
    )


def open_batches(
    stage: StageConfig,
    model: MLMambaConfig,
    source: RecordSource,
    tokenizer: Tokenizer,
    order: Order,
    first: int,
    last: int,
    part: tuple[int, int] = (0, 1),
    skipped: Mapping[str, str] | None = None,
) -> BatchStream:
    """Batches number `first` to `last - 1` of a stage, of each the rows that are the i-th of n parts. Close it when done."""
    data = stage.data
    return batches(
        source,
        tokenizer,
        model,
        order=order,
        batch_size=stage.batch_size,
        max_tokens=data.max_tokens,
        first=first,
        last=last,
        form=data.form,
        workers=data.workers,
        max_bad=data.max_bad,
        part=part,
        skipped=skipped,
    )


def row_lengths(data: DataConfig, model: MLMambaConfig) -> list[int]:
    """Every number of positions that a row of the language model may have."""
    if data.batching == "packed":
        return [data.row_length]
    text = buckets(data.max_tokens, data.buckets) if data.batching == "grouped" else [data.max_tokens]
    alone = text if data.batching == "grouped" and model.vision else []
    return [model.n_visual_tokens + n for n in text] + alone
