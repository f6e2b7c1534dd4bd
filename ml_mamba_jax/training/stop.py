"""A run that is asked to stop, by SIGTERM or Ctrl-C: whether it was, and what happens when.

While steps are taken the run finishes what it is at, writes a checkpoint and ends; it asks `Stop.requested` between steps. At all
other times everything worth keeping is on disk, and the signal ends the run where it stands. A second signal ends it in any case.

Python hears a signal when it gets to run, which it does not while XLA compiles. Before there is anything to save, a thread ends the
process then.
"""

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import jax

from ml_mamba_jax import processes

SIGNALS = (signal.SIGTERM, signal.SIGINT)
DEAF_AFTER = 2.0
"""Seconds in which Python hears of a signal, unless it waits for a compiler."""


class Stopped(BaseException):
    """The run was asked to stop and did: no error. Like KeyboardInterrupt it is nothing that `except Exception` should catch."""


class Stop:
    """Listens to the signals inside `with`, in the main thread, and ends the block when the run has `Stopped`.

    Of several processes of a run each listens, and what one hears all do. Without `with`, nothing is ever requested.
    """

    def __init__(self, farewell: Callable[[str], None] = lambda _: None) -> None:
        """`farewell` is given the last words of a process that ends while XLA compiles."""
        self._signal: signal.Signals | None = None
        self._farewell = farewell
        self._waits = self._agreed = False
        self._heard = threading.Event()
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> "Stop":
        self._before = {number: signal.signal(number, self._hear) for number in SIGNALS}
        self._arrivals, self._wakeup = socket.socketpair()  # a byte for each signal, written by the interpreter at once
        self._wakeup.setblocking(False)
        signal.set_wakeup_fd(self._wakeup.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._end_if_deaf, daemon=True, name="signals").start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> bool:
        self._restore()
        signal.set_wakeup_fd(-1)
        self._wakeup.close()  # which ends the thread
        if isinstance(error, Stopped):
            print(error, flush=True)
            if jax.process_count() > 1 and not self._agreed:
                raise SystemExit(0)  # the others have not heard, and are to be told
        return isinstance(error, Stopped)

    def requested(self) -> bool:
        """Whether the run, in any of its processes, was asked to stop. Once it was, it stays so. All processes ask together."""
        self._agreed = self._agreed or processes.total(self._signal is not None)[0] > 0
        return self._agreed

    @contextlib.contextmanager
    def waits(self) -> Iterator[None]:
        """Inside, a signal only makes `requested` true. Outside, it raises `Stopped`."""
        self._waits = True
        try:
            yield
        finally:
            self._waits = False

    def _hear(self, number: int, _: FrameType | None) -> None:
        self._signal = signal.Signals(number)
        self._heard.set()
        self._restore()  # the next one does what it does in any program
        if not self._waits:
            raise Stopped(f"stopped by {self._signal.name}")
        line = f"{self._signal.name}: stopping after this step, with a checkpoint; once more to stop at once\n"
        os.write(sys.__stderr__.fileno(), line.encode())  # print may be what the signal interrupts

    def _end_if_deaf(self) -> None:
        with self._arrivals as arrivals:
            while number := arrivals.recv(1):
                if not self._waits and not self._heard.wait(DEAF_AFTER):
                    words = f"stopped by {signal.Signals(number[0]).name}"
                    print(words, flush=True)
                    self._farewell(words)
                    for worker in multiprocessing.active_children():
                        worker.kill()
                    os._exit(0)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
