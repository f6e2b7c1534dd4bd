"""Tasks in processes: all results, the first error, and no silence when a worker is gone."""

import multiprocessing
import os
import signal
import time

import pytest

from ml_mamba_jax.data.parallel import spread
from ml_mamba_jax.errors import InputError, WorkerError


def square_or_worse(task):
    if task == "raise":
        raise InputError("record 7: got nothing")
    if task == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    return task * task


def test_every_task_is_done_once_by_any_number_of_workers():
    for workers in (0, 1, 3):
        assert sorted(spread(square_or_worse, range(20), workers)) == [i * i for i in range(20)]
    assert not multiprocessing.active_children()


def test_errors_and_deaths_reach_the_caller_and_leave_no_process():
    with pytest.raises(InputError, match="record 7: got nothing"):
        list(spread(square_or_worse, [1, "raise", 2, 3], 2))
    started = time.perf_counter()
    with pytest.raises(WorkerError, match="a worker process was killed by SIGKILL while it was busy with die"):
        list(spread(square_or_worse, [1, 2, "die", 3, 4], 2))
    assert time.perf_counter() - started < 10
    assert not multiprocessing.active_children()
