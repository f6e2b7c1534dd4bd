"""Tasks spread over processes: results as they come, errors as they were raised, no process left behind.

A worker that dies is an error that names it and its task. When the parent dies, its workers see their pipe close and end.
"""

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from ml_mamba_jax.errors import WorkerError

Task = TypeVar("Task")
Result = TypeVar("Result")


def default_workers() -> int:
    """As many as this process may use cores."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def spread(function: Callable[[Task], Result], tasks: Iterable[Task], workers: int) -> Iterator[Result]:
    """`function` of every task, in whatever order they are done. Tasks are taken from the iterable when a worker is free.

    Args:
        function: of a module, so that it can be named to another process.
        workers: processes; below 2 the tasks are done in this one.

    Raises:
        WorkerError: a worker died. Whatever `function` raises, or the iterable.
    """
    if workers < 2:
        yield from map(function, tasks)
        return
    context, tasks = multiprocessing.get_context("spawn"), iter(tasks)
    processes: dict[Connection, Any] = {}
    busy: dict[Connection, Task] = {}

    def give(connection: Connection) -> None:
        for task in tasks:
            with contextlib.suppress(BrokenPipeError):  # it died before; the wait below tells
                connection.send(task)
            busy[connection] = task
            return

    try:
        for task in tasks:
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, function), daemon=True)
            process.start()
            theirs.close()
            processes[ours], busy[ours] = process, task
            with contextlib.suppress(BrokenPipeError):
                ours.send(task)
            if len(processes) == workers:
                break
        while busy:
            for connection in wait(list(busy)):
                task = busy.pop(connection)
                try:
                    done, result = connection.recv()
                except (EOFError, ConnectionResetError) as error:
                    processes[connection].join()
                    raise WorkerError(
                        f"a worker process {_how(processes[connection].exitcode)} while it was busy with {task}; "
                        "start again, with fewer workers if memory ran out"
                    ) from error
                if not done:
                    raise result
                give(connection)
                yield result
    finally:
        for connection, process in processes.items():
            connection.close()
            if connection in busy:
                process.terminate()
        for process in processes.values():
            process.join()


def _how(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        return f"was killed by {signal.Signals(-exit_code).name}"
    return f"ended with exit code {exit_code}"


def _serve(connection: Connection, function: Callable) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it too, and ends us
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        try:
            answer = True, function(task)
        except Exception as error:
            answer = False, error
        try:
            connection.send(answer)
        except BrokenPipeError:
            return
