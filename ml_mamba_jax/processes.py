"""What the processes of one run do together. A single process waits for nobody here, and JAX is asked nothing but their number.

All processes call these functions in the same order. Waiting has no limit of its own: `training.watch` ends a run in which
somebody does not come.
"""

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from ml_mamba_jax.errors import CheckpointError


def is_first() -> bool:
    """Whether this is process 0, which writes what a run needs once."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Return when all processes have come here. Several barriers may have one name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


@contextlib.contextmanager
def first_before_others(name: str) -> Iterator[None]:
    """The block runs in process 0, and then in the others: they find what it wrote, or write it where it is not theirs too."""
    if not is_first():
        barrier(name)
    yield
    if is_first():
        barrier(name)


def total(*counts: int) -> list[int]:
    """The sums of the counts of all processes, each below 2^31."""
    if jax.process_count() == 1:
        return list(counts)
    return multihost_utils.process_allgather(np.asarray(counts, np.int32)).sum(axis=0, dtype=np.int64).tolist()


def gather(value: Any) -> list[Any]:
    """A JSON value of every process, in their order."""
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(data.size))
    row = np.zeros(sizes.max(), np.uint8)
    row[: data.size] = data
    rows = multihost_utils.process_allgather(row)
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def from_first(function: Callable[[], Any]) -> Any:
    """The JSON value that `function` returns in process 0, the only one to call it."""
    return gather(function() if is_first() else None)[0]


def checked_by_first(check: Callable[[], Any]) -> None:
    """Let process 0 check files that all of them are about to read. All raise the CheckpointError that it raises."""
    problem = None
    if is_first():
        try:
            check()
        except CheckpointError as error:
            problem = str(error)
    found = gather(problem)[0]
    if found is not None:
        raise CheckpointError(found)


def place(tree: Any, shardings: Any) -> Any:
    """Arrays that every process holds whole -> the same on the devices of all, by a sharding or a tree of them."""

    def put(array, sharding: jax.sharding.Sharding) -> jax.Array:
        if sharding.is_fully_addressable:
            return jax.device_put(array, sharding)
        array = np.asarray(array)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    if isinstance(shardings, jax.sharding.Sharding):
        return jax.tree.map(lambda array: put(array, shardings), tree)
    return jax.tree.map(put, tree, shardings)
