"""Which records make up which batch: pure functions of the lengths of the records and of a seed.

Batch number i holds the same records whatever reads it, so a position in the data is the number of the next batch. Three orders:

* `RandomOrder`: a stream of shuffled epochs, cut into batches; every row is padded to one length.
* `GroupedOrder`: rows of a batch have similar lengths, and all of them an image or none.
* `PackedOrder`: a row holds as many records as fit, one after the other.

In the latter two an epoch ends with a batch, which rows without records fill up.
"""

import abc
import bisect
import math
import threading
from collections.abc import Sequence
from typing import Literal, NamedTuple

import grain
import numpy as np

from ml_mamba_jax.errors import InputError

Batching = Literal["random", "grouped", "packed"]
WINDOW = 50
"""Batches' worth of shuffled records among which those of similar length are put together, or packed."""
EPOCHS_KEPT = 4


class Lengths(NamedTuple):
    """Of every record: `tokens` int32 [n], those of the whole text; `has_image` bool [n]."""

    tokens: np.ndarray
    has_image: np.ndarray


class Plan(NamedTuple):
    """What a batch is made of. `rows`: numbers of the records in each row; none in a row that only fills up.

    `length`: positions that every row is padded to. `has_image`: whether all rows have an image or none; None: some may.
    """

    rows: tuple[tuple[int, ...], ...]
    length: int
    has_image: bool | None


class Order(abc.ABC):
    """Which records make up which batch."""

    @abc.abstractmethod
    def batch(self, number: int) -> Plan:
        """The plan of batch `number`, counted from 0 through all epochs."""

    @abc.abstractmethod
    def n_batches(self, epochs: int | float) -> int:
        """Batches of so many epochs, at least one."""


class RandomOrder(Order):
    """Shuffled epochs one after the other, cut into batches of `batch_size` rows of `length` tokens."""

    def __init__(self, n_records: int, batch_size: int, length: int, seed: int):
        self._n_records, self._batch_size, self._length = n_records, batch_size, length
        self._records = grain.MapDataset.range(n_records).seed(seed).shuffle().repeat()

    def batch(self, number: int) -> Plan:
        first = number * self._batch_size
        rows = tuple((int(self._records[i]),) for i in range(first, first + self._batch_size))
        return Plan(rows, self._length, None)

    def n_batches(self, epochs: int | float) -> int:
        return max(1, math.ceil(epochs * self._n_records / self._batch_size))


class _Epochs(Order):
    """Orders that plan an epoch at a time. Threads may share one, and it may be sent to another process."""

    def __init__(self, batch_size: int, seed: int):
        self._batch_size, self._seed = batch_size, seed
        self._ends: list[int] = []  # of the epochs that were planned, in batches from the start
        self._kept: dict[int, list[Plan]] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state, _lock=threading.Lock())

    def batch(self, number: int) -> Plan:
        with self._lock:
            while not self._ends or number >= self._ends[-1]:
                self._ends.append((self._ends[-1] if self._ends else 0) + len(self._epoch(len(self._ends))))
            epoch = bisect.bisect_right(self._ends, number)
            return self._epoch(epoch)[number - (self._ends[epoch - 1] if epoch else 0)]

    def n_batches(self, epochs: int | float) -> int:
        with self._lock:
            whole, part = int(epochs), epochs - int(epochs)
            n = sum(len(self._epoch(epoch)) for epoch in range(whole))
            return max(1, n + (math.ceil(part * len(self._epoch(whole))) if part else 0))

    def _epoch(self, epoch: int) -> list[Plan]:
        if epoch not in self._kept:
            while len(self._kept) >= EPOCHS_KEPT:
                self._kept.pop(next(iter(self._kept)))
            self._kept[epoch] = self._plan(epoch, np.random.default_rng([self._seed, epoch]))
        return self._kept[epoch]

    @abc.abstractmethod
    def _plan(self, epoch: int, rng: np.random.Generator) -> list[Plan]:
        """The batches of an epoch."""

    def _filled(self, rows: Sequence[tuple[int, ...]]) -> tuple[tuple[int, ...], ...]:
        return (*rows, *[()] * (self._batch_size - len(rows)))


class GroupedOrder(_Epochs):
    """Batches of records of similar length, with an image in each row or in none.

    Every record comes once in an epoch. The first epoch begins with the longest batch: what does not fit into memory shows at once.
    """

    def __init__(self, lengths: Lengths, batch_size: int, buckets: Sequence[int], seed: int):
        """`buckets`: the lengths that rows may be padded to, ascending; the last is where texts are cut."""
        super().__init__(batch_size, seed)
        self._buckets = tuple(buckets)
        self._tokens = np.minimum(lengths.tokens, self._buckets[-1])
        self._has_image = lengths.has_image

    def _plan(self, epoch: int, rng: np.random.Generator) -> list[Plan]:
        plans = []
        for has_image in (True, False):
            records = rng.permutation(np.flatnonzero(self._has_image == has_image))
            for window in _cut(records, WINDOW * self._batch_size):
                by_length = window[np.argsort(-self._tokens[window], kind="stable")]
                for some in _cut(by_length, self._batch_size):
                    length = self._buckets[bisect.bisect_left(self._buckets, int(self._tokens[some[0]]))]
                    plans.append(Plan(self._filled([(int(record),) for record in some]), length, has_image))
        order = rng.permutation(len(plans))
        plans = [plans[i] for i in order]
        if epoch == 0:
            longest = max(range(len(plans)), key=lambda i: (plans[i].length, bool(plans[i].has_image), -i))
            plans.insert(0, plans.pop(longest))
        return plans


class PackedOrder(_Epochs):
    """Rows of `row_length` positions that hold records one after the other, each its visual tokens and then its text.

    A row has at most `image_slots` images, as many as would fill it if all were average: fewer would leave its end empty.
    """

    def __init__(self, lengths: Lengths, batch_size: int, row_length: int, max_tokens: int, n_visual: int, seed: int):
        """`n_visual`: visual tokens of an image, 0 for a model without encoders; `max_tokens`: where texts are cut.

        Raises:
            InputError: a row is too short for the longest record.
        """
        super().__init__(batch_size, seed)
        if max_tokens + n_visual > row_length:
            raise InputError(
                f"data.row_length: got {row_length}, expected at least {max_tokens + n_visual} = max_tokens {max_tokens} + "
                f"{n_visual} visual tokens; raise it or lower --data.max-tokens"
            )
        self._row_length = row_length
        self._has_image = lengths.has_image & (n_visual > 0)
        self._sizes = np.minimum(lengths.tokens, max_tokens) + n_visual * self._has_image
        with_image = self._sizes[self._has_image]
        self.image_slots = math.ceil(row_length / with_image.mean()) if len(with_image) else 0

    def _plan(self, epoch: int, rng: np.random.Generator) -> list[Plan]:
        records = rng.permutation(len(self._sizes))
        per_row = max(1, self._row_length // max(1, int(self._sizes.mean())))
        rows = []
        for window in _cut(records, WINDOW * self._batch_size * per_row):
            rows += self._pack(window)
        rows = [rows[i] for i in rng.permutation(len(rows))]
        has_image = bool(self.image_slots)
        return [Plan(self._filled(some), self._row_length, has_image) for some in _cut(rows, self._batch_size)]

    def _pack(self, records: np.ndarray) -> list[tuple[int, ...]]:
        """Best fit, the longest first: each record goes to the fullest row that it fits into."""
        rows: list[list[int]] = []
        images: list[int] = []
        with_slot: list[tuple[int, int]] = []  # room and number of rows that can take an image, ascending
        without: list[tuple[int, int]] = []
        for record in records[np.argsort(-self._sizes[records], kind="stable")]:
            size, has_image = int(self._sizes[record]), bool(self._has_image[record])
            room, row = self._row_length, len(rows)
            for open_rows in (with_slot,) if has_image else (without, with_slot):
                at = bisect.bisect_left(open_rows, (size, -1))
                if at < len(open_rows):
                    room, row = open_rows.pop(at)
                    break
            if row == len(rows):
                rows.append([])
                images.append(0)
            rows[row].append(int(record))
            images[row] += has_image
            bisect.insort(with_slot if images[row] < self.image_slots else without, (room - size, row))
        return [tuple(row) for row in rows]


def buckets(max_tokens: int, number: int) -> list[int]:
    """`number` lengths, each half of the next, the last `max_tokens`; fewer where they would be below 8 tokens."""
    lengths = [max_tokens]
    while len(lengths) < number and lengths[0] > 8:
        lengths.insert(0, -(-lengths[0] // 16) * 8)
        if lengths[0] == lengths[1]:
            lengths.pop(0)
            break
    return lengths


def _cut(items, size: int) -> list:
    return [items[start : start + size] for start in range(0, len(items), size)]
