"""Batches in an order that depends on the seed alone, decoded and collated by threads or processes of grain.

Batch number i holds the same rows whatever the number of workers, so a position in the data is just the number of the next step.
"""

import contextlib
import functools
import hashlib
import multiprocessing
import queue
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import grain
import numpy as np

from ml_mamba_jax.config import MLMambaConfig
from ml_mamba_jax.data.lengths import measure
from ml_mamba_jax.data.order import Batching, GroupedOrder, Order, PackedOrder, Plan, RandomOrder, buckets
from ml_mamba_jax.data.parallel import default_workers
from ml_mamba_jax.data.samples import Batch, Form, Sample, collate, collate_packed, make_sample
from ml_mamba_jax.data.source import RecordSource
from ml_mamba_jax.errors import InputError, WorkerError
from ml_mamba_jax.tokenizer import Tokenizer

LOOK_EVERY = 0.5
"""Seconds between two looks whether the workers live, while waiting for them."""
STALLED_AFTER = 600.0
"""Seconds without a batch that are an error."""
MAX_THREADS = 16
CLOSING = 5.0
"""Seconds that a batch which is being read may take, when the stream is closed."""


def make_order(
    source: RecordSource,
    tokenizer: Tokenizer,
    config: MLMambaConfig,
    *,
    batch_size: int,
    max_tokens: int,
    seed: int,
    form: Form = "chat",
    batching: Batching = "random",
    n_buckets: int = 4,
    row_length: int = 4096,
) -> Order:
    """Which records make up which batch.

    Args:
        max_tokens: text tokens of a record; longer conversations are cut.
        form: what of a conversation is learnt, see `ml_mamba_jax.data.samples.tokenize`.
        batching: "random" pads all rows to `max_tokens`. "grouped" puts together what is of similar length, each batch padded to
            one of `n_buckets` lengths, and text alone apart from images. "packed" puts several records into rows of `row_length`
            positions. The latter two count the tokens of all records before they start, once for a data set and a tokenizer.

    Raises:
        InputError: an empty source, a row that is too short, or a record that cannot be counted; names it.
    """
    if not len(source):
        raise InputError(f"{source}: got no records, expected at least one")
    if batching == "random":
        return RandomOrder(len(source), batch_size, max_tokens, seed)
    lengths = measure(source, tokenizer, config.prompt_format, form)
    if not config.vision:
        lengths = lengths._replace(has_image=lengths.has_image & False)
    if batching == "grouped":
        return GroupedOrder(lengths, batch_size, buckets(max_tokens, n_buckets), seed)
    n_visual = config.n_visual_tokens if config.vision else 0
    return PackedOrder(lengths, batch_size, row_length, max_tokens, n_visual, seed)


def batches(
    source: RecordSource,
    tokenizer: Tokenizer,
    config: MLMambaConfig,
    *,
    batch_size: int,
    max_tokens: int,
    first: int,
    last: int,
    seed: int = 0,
    form: Form = "chat",
    workers: int = 0,
    order: Order | None = None,
    max_bad: float = 0.0,
    part: tuple[int, int] = (0, 1),
    skipped: Mapping[str, str] | None = None,
) -> "BatchStream":
    """Batches number `first` to `last - 1` of an endless stream; every epoch has an order of its own.

    Args:
        batch_size, max_tokens, seed, form: as of `make_order`.
        workers: processes that decode and tokenise; 0 uses threads of this one.
        order: what `make_order` gave. Default: a random one of the seed.
        max_bad: the part of the records that may be unusable. Such a record is told of on stderr, and there is nothing to learn
            where it would have stood. 0 refuses the first.
        part: (i, n) for the i-th n-th of the rows of each batch, which is all that is read. Where a batch may hold rows with and
            without an image, all its parts have an `image_mask`.
        skipped: records that could not be used before, by id, and why; they count too.

    Raises:
        InputError: an empty source, rows that cannot be dealt out, or, while iterating, a record that cannot be used; names it.
        WorkerError: while iterating, a worker that died.
    """
    order = order or make_order(
        source, tokenizer, config, batch_size=batch_size, max_tokens=max_tokens, seed=seed, form=form
    )
    if batch_size % part[1]:
        raise InputError(f"batch_size: got {batch_size}, expected a multiple of {part[1]}, the number of parts")
    load = _Load(source, tokenizer, config, order, max_tokens, form, max_bad > 0, part)
    dataset = grain.MapDataset.range(first, last).map(load)
    threads = 1 if workers else min(max(2, default_workers()), MAX_THREADS)  # each is busy with a batch of its own
    iterator = dataset.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + 1))
    if workers:
        _mark_absl_flags_as_parsed()
        iterator = iterator.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
    return BatchStream(iter(iterator), int(max_bad * len(source)), len(source), skipped or {})


class Loaded(NamedTuple):
    """A batch, the ids of the records in it, and why some of them are not."""

    batch: Batch
    ids: list[str]
    problems: list[tuple[str, str]]


class _Load:
    """Reads a batch by its number."""

    def __init__(
        self,
        source: RecordSource,
        tokenizer: Tokenizer,
        config: MLMambaConfig,
        order: Order,
        max_tokens: int,
        form: Form,
        skip: bool,
        part: tuple[int, int],
    ):
        self._source, self._order, self._config, self._skip, self._part = source, order, config, skip, part
        self._pad_id = tokenizer.eos_id
        self._make = functools.partial(
            make_sample, tokenizer=tokenizer, config=config, max_tokens=max_tokens, form=form
        )

    def __call__(self, number: int) -> Loaded:
        plan = self._order.batch(number)
        index, parts = self._part
        n_rows = len(plan.rows) // parts
        ids: list[str] = []
        problems: list[tuple[str, str]] = []
        rows = [
            [sample for record in row if (sample := self._sample(record, ids, problems)) is not None]
            for row in plan.rows[index * n_rows : (index + 1) * n_rows]
        ]
        return Loaded(self._collate(rows, plan), ids, problems)

    def _collate(self, rows: list[list[Sample]], plan: Plan) -> Batch:
        if isinstance(self._order, PackedOrder):
            return collate_packed(rows, self._config, self._pad_id, plan.length, self._order.image_slots)
        alone = [row[0] if row else None for row in rows]
        batch = collate(alone, self._config, self._pad_id, plan.length, has_image=plan.has_image)
        if self._part[1] > 1 and plan.has_image is None and batch.images and batch.image_mask is None:
            return batch._replace(image_mask=np.ones(len(alone), bool))  # other parts may have rows without an image
        return batch

    def _sample(self, number: int, ids: list[str], problems: list[tuple[str, str]]) -> Sample | None:
        record = self._source[number]
        try:
            sample = self._make(record)
        except InputError as error:
            if not self._skip:
                raise
            problems.append((record.id, str(error)))
            return None
        ids.append(record.id)
        return sample


class BatchStream(Iterator[Batch]):
    """Batches as they come, and how long they let one wait. Close it when done."""

    ids: list[str]
    """Of the records in the last batch."""
    waited: float
    """Seconds that the last batch was waited for; where these are much of a step, the data is too slow for the device."""
    skipped: dict[str, str]
    """Records that could not be used, by id, and why."""

    def __init__(self, iterator: grain.DatasetIterator, allowed_bad: int, n_records: int, skipped: Mapping[str, str]):
        self._iterator, self._allowed_bad, self._n_records = iterator, allowed_bad, n_records
        self.ids, self.waited, self.skipped = [], 0.0, dict(skipped)
        self._others, self._workers = set(multiprocessing.active_children()), set()
        self._queue: queue.Queue = queue.Queue(maxsize=1)
        self._closed = threading.Event()
        self._reader = threading.Thread(target=self._read, args=(iterator,), daemon=True, name="batches")
        self._reader.start()

    @property
    def digest(self) -> str:
        """Of the ids of the records in the last batch, in their order."""
        return hashlib.sha256("\n".join(self.ids).encode()).hexdigest()[:12]

    def __next__(self) -> Batch:
        if self._closed.is_set():
            raise StopIteration
        started = time.perf_counter()
        try:
            loaded = self._take()
        except BaseException:
            self.close()
            raise
        self.waited = time.perf_counter() - started
        if loaded is None:
            self.close()
            raise StopIteration
        self.ids = loaded.ids
        self._count_bad(loaded.problems)
        return loaded.batch

    def close(self) -> None:
        """End the threads and processes."""
        if not self._closed.is_set():
            self._closed.set()
            # grain wants no other thread in its iterator, but one may be stuck there.
            self._reader.join(timeout=CLOSING)
            with contextlib.suppress(queue.Empty):
                self._queue.get_nowait()
            self._iterator.close()
            self._iterator = None  # or it might be closed again when Python ends, which grain does not survive

    def _take(self) -> Loaded | None:
        """The next batch, None at the end."""
        started = time.perf_counter()
        while True:
            self._look_at_workers()
            if time.perf_counter() - started > STALLED_AFTER:
                raise WorkerError(
                    f"data: got no batch for {STALLED_AFTER:.0f} s after the one with {', '.join(self.ids[:3]) or 'nothing'}; "
                    "see whether the storage answers, and resume the run"
                )
            try:
                taken = self._queue.get(timeout=LOOK_EVERY)
            except queue.Empty:
                continue
            if isinstance(taken, BaseException):
                self._look_at_workers()
                raise taken
            return taken

    def _read(self, iterator: grain.DatasetIterator) -> None:
        """Fill the queue from another thread, so that a worker that is silent cannot stop us from looking at it."""
        try:
            for loaded in iterator:
                self._put(loaded)
                if self._closed.is_set():
                    return
            self._put(None)
        except BaseException as error:
            self._put(error)

    def _put(self, item) -> None:
        while not self._closed.is_set():
            with contextlib.suppress(queue.Full):
                return self._queue.put(item, timeout=LOOK_EVERY)

    def _look_at_workers(self) -> None:
        """grain tells of a dead worker when it is its turn to give a batch, which may be much later."""
        self._workers |= {process for process in multiprocessing.active_children() if "grain" in process.name}
        for process in self._workers - self._others:
            if code := process.exitcode:
                how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
                raise WorkerError(
                    f"data: worker process {process.pid} {how}; resume the run, with fewer --data.workers if memory ran out"
                )

    def _count_bad(self, problems: list[tuple[str, str]]) -> None:
        for id, problem in problems:
            if id not in self.skipped:
                self.skipped[id] = problem
                print(f"skipped, number {len(self.skipped)}: {problem}", file=sys.stderr, flush=True)
        if len(self.skipped) > self._allowed_bad:
            self.close()
            raise InputError(
                f"data: got {len(self.skipped)} of {self._n_records} records that cannot be used, expected at most "
                f"{self._allowed_bad}; mend them (python -m ml_mamba_jax.data.check lists them) or raise --data.max-bad"
            )


def _mark_absl_flags_as_parsed() -> None:
    """grain's workers read absl flags, which nobody has parsed outside an absl program."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
