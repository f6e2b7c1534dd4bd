"""Batches in an order that depends on the seed alone: shuffled, decoded and batched by grain.

Batch number i holds the same rows whatever the number of workers, so a position in the data is just the number of the next step.
"""

import functools
from collections.abc import Iterator

import grain

from ml_mamba_jax.config import MLMambaConfig
from ml_mamba_jax.data.samples import Batch, Form, collate, make_sample
from ml_mamba_jax.data.source import RecordSource
from ml_mamba_jax.errors import InputError
from ml_mamba_jax.tokenizer import Tokenizer


def batches(
    source: RecordSource,
    tokenizer: Tokenizer,
    config: MLMambaConfig,
    *,
    batch_size: int,
    max_tokens: int,
    seed: int,
    first: int,
    last: int,
    form: Form = "chat",
    workers: int = 0,
) -> Iterator[Batch]:
    """Batches number `first` to `last - 1` of an endless shuffled stream; every epoch has an order of its own.

    Args:
        max_tokens: text tokens of a row; longer conversations are cut, all are padded to it.
        form: what of a conversation is learnt, see `ml_mamba_jax.data.samples.tokenize`.
        workers: processes that decode and tokenise; 0 uses threads of this one.

    Raises:
        InputError: an empty source, or, while iterating, a record that cannot be used; names it.
    """
    if not len(source):
        raise InputError(f"{source}: got no records, expected at least one")
    rows = last * batch_size
    dataset = (
        grain.MapDataset.source(source)
        .seed(seed)
        .shuffle()
        .repeat(-(-rows // len(source)))
        .map(functools.partial(make_sample, tokenizer=tokenizer, config=config, max_tokens=max_tokens, form=form))
        .batch(
            batch_size,
            drop_remainder=True,
            batch_fn=functools.partial(collate, config=config, pad_id=tokenizer.eos_id, length=max_tokens),
        )
        .slice(slice(first, last))
    )
    iterator = dataset.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=8))
    if workers:
        _mark_absl_flags_as_parsed()
        iterator = iterator.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
    return _closing(iter(iterator))


def _closing(iterator: grain.DatasetIterator) -> Iterator[Batch]:
    """Pass batches on, and end grain's threads and processes with the iteration."""
    try:
        yield from iterator
    finally:
        iterator.close()


def _mark_absl_flags_as_parsed() -> None:
    """grain's workers read absl flags, which nobody has parsed outside an absl program."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
