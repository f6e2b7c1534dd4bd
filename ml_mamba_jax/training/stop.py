"""A run that is asked to stop, by SIGTERM or Ctrl-C: whether it was, and what happens when.

While steps are taken the run finishes what it is at, writes a checkpoint and ends; it asks `Stop.requested` between steps. At all
other times everything worth keeping is on disk, and the signal ends the run where it stands. A second signal ends it in any case.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType

import jax

from ml_mamba_jax import processes

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(BaseException):
    """The run was asked to stop and did: no error. Like KeyboardInterrupt it is nothing that `except Exception` should catch."""


class Stop:
    """Listens to the signals inside `with`, in the main thread, and ends the block when the run has `Stopped`.

    Of several processes of a run each listens, and what one hears all do. Without `with`, nothing is ever requested.
    """

    def __init__(self) -> None:
        self._signal: signal.Signals | None = None
        self._waits = self._agreed = False
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> "Stop":
        self._before = {number: signal.signal(number, self._hear) for number in SIGNALS}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> bool:
        self._restore()
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
        self._restore()  # the next one does what it does in any program
        if not self._waits:
            raise Stopped(f"stopped by {self._signal.name}")
        line = f"{self._signal.name}: stopping after this step, with a checkpoint; once more to stop at once\n"
        os.write(sys.__stderr__.fileno(), line.encode())  # print may be what the signal interrupts

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
