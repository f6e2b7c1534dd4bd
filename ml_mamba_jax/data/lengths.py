"""How long every record of a data set is in tokens: measured once for a tokenizer, and kept beside the data set."""

import functools
import hashlib
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ml_mamba_jax.data.order import Lengths
from ml_mamba_jax.data.parallel import default_workers, spread
from ml_mamba_jax.data.progress import progress
from ml_mamba_jax.data.samples import Form, pieces_of
from ml_mamba_jax.data.source import RecordSource
from ml_mamba_jax.tokenizer import Tokenizer

RECORDS_PER_TASK = 1000
IN_THIS_PROCESS = 5000
"""Up to so many records it does not pay to start other processes."""


class Task(NamedTuple):
    folder: Path
    split: str
    records: range
    tokenizer: str
    prompt_format: str
    form: Form

    def __str__(self) -> str:
        return f"records {self.records.start} to {self.records.stop - 1} of {self.folder}"


class Measured(NamedTuple):
    first: int
    tokens: list[int]
    has_image: list[bool]


def measure(source: RecordSource, tokenizer: Tokenizer, prompt_format: str, form: Form = "chat") -> Lengths:
    """The lengths of all records, read back where they were measured before.

    Raises:
        InputError: a conversation where a caption is to be learnt; names the record.
    """
    model = tokenizer.backend.to_str()
    key = hashlib.sha256(f"{prompt_format} {form} {model}".encode()).hexdigest()[:12]
    path = source.folder / f"lengths-{source.split}-{key}.npz"
    if path.is_file():
        with np.load(path) as kept:
            lengths = Lengths(kept["tokens"], kept["has_image"])
        if len(lengths.tokens) == len(source):
            return lengths
    lengths = _measure(source, model, prompt_format, form)
    if os.access(source.folder, os.W_OK):  # else they are measured again the next time
        aside = path.with_name(f".{path.name}.{os.getpid()}.npz")
        np.savez(aside, **lengths._asdict())
        aside.replace(path)
    return lengths


def _measure(source: RecordSource, model: str, prompt_format: str, form: Form) -> Lengths:
    n = len(source)
    tokens, has_image = np.zeros(n, np.int32), np.zeros(n, bool)
    tasks = (
        Task(source.folder, source.split, range(i, min(i + RECORDS_PER_TASK, n)), model, prompt_format, form)
        for i in range(0, n, RECORDS_PER_TASK)
    )
    workers = 0 if n <= IN_THIS_PROCESS else default_workers()
    with progress("counting tokens", n) as update:
        for first, counts, images in spread(measure_some, tasks, workers):
            tokens[first : first + len(counts)] = counts
            has_image[first : first + len(counts)] = images
            update(len(counts))
    return Lengths(tokens, has_image)


def measure_some(task: Task) -> Measured:
    """The lengths of the records of a task."""
    source, tokenizer = _open(task.folder, task.split), _tokenizer(task.tokenizer)
    tokens, has_image = [], []
    for number in task.records:
        record = source[number]
        pieces = pieces_of(record.turns, record.id, task.prompt_format, task.form)
        tokens.append(len(tokenizer.encode_pieces(pieces)[0]))
        has_image.append(record.image is not None)
    return Measured(task.records.start, tokens, has_image)


@functools.lru_cache(maxsize=1)
def _open(folder: Path, split: str) -> RecordSource:
    return RecordSource.open(folder, split)


@functools.lru_cache(maxsize=1)
def _tokenizer(model: str) -> Tokenizer:
    from tokenizers import Tokenizer as Backend

    return Tokenizer(Backend.from_str(model))
