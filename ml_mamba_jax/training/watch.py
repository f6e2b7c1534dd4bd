"""Looks whether all processes of a run live and go on, and ends them when one does not.

Every process tells the others through the key-value store of JAX's coordinator, which runs in process 0, that it lives and what
it is doing. Process 0 judges: a process that is silent, that failed, or that does not go on. The others read the verdict, and
judge process 0 alone. Whoever ends shows the stacks of all its threads, and one line that names the process to look at.

JAX watches too, and ends a process whose coordinator is gone by `abort()` in a thread of its own, out of Python's reach. Hence
the handler in C: it tells what happened in the same form.
"""

import contextlib
import ctypes
import faulthandler
import json
import math
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
import traceback
from typing import Any, NoReturn

import jax

from ml_mamba_jax.errors import WorkerError

LONGEST_BEAT = 2.0
"""Seconds between two signs of life; less where the limit is short."""
KEY = "ml_mamba_jax/watch"


class Peer:
    """What is known of a process, and since when (`time.monotonic`)."""

    def __init__(self, now: float):
        self.sign: dict[str, Any] = {"turn": 0, "place": "starting", "timed": False, "failed": None, "verdict": None}
        self.heard = self.moved = now

    def hear(self, sign: dict[str, Any], now: float) -> None:
        if sign.get("beat") != self.sign.get("beat"):
            self.heard = now
        if (sign["turn"], sign["failed"]) != (self.sign["turn"], self.sign["failed"]):
            self.moved = now
        self.sign = sign


class Watch:
    """The watch of one process over the others. A single process has one too, which does nothing.

    `peer_timeout`: seconds without a sign of life after which a process is missing. `step_timeout`: seconds that all may be at
    one place, None for no limit.
    """

    def __init__(self, peer_timeout: float, step_timeout: float | None = None):
        self._peer_timeout, self._step_timeout = peer_timeout, step_timeout
        self._beat = min(LONGEST_BEAT, peer_timeout / 6)
        self._mine = Peer(time.monotonic()).sign
        self._state: Any = None
        self._peers: dict[int, Peer] = {}
        self._started: float | None = None
        self._stood_still, self._awake_since = 0.0, -math.inf
        self._stopped, self._ending = threading.Event(), threading.Lock()

    def expect(self, state: Any) -> None:
        """From here on an abort of JAX means that the processes did not find each other. `state`: of `jax.distributed`."""
        self._state, self._started = state, time.monotonic()
        # JAX's client ends the process from a thread that Python does not know. Kept, for C keeps no reference.
        self._on_abort = ctypes.CFUNCTYPE(None, ctypes.c_int)(self._aborted)
        ctypes.CDLL(None).signal(signal.SIGABRT, self._on_abort)

    def begin(self) -> None:
        """All processes are there: from here on they are watched."""
        self._started = None
        judged = range(1, self._state.num_processes) if self._process == 0 else range(1)
        self._peers = {i: Peer(time.monotonic()) for i in judged}
        for task in (self._tell, self._look):
            threading.Thread(target=task, daemon=True, name=task.__name__.strip("_")).start()

    def at(self, place: str, timed: bool = True) -> None:
        """Say what this process does from now on. All processes say the same in the same order; `timed`: within step_timeout."""
        self._mine = {**self._mine, "turn": self._mine["turn"] + 1, "place": place, "timed": timed}

    @property
    def n_processes(self) -> int:
        """How many processes the run has."""
        return 1 if self._state is None else self._state.num_processes

    @property
    def _process(self) -> int:
        return self._state.process_id

    def close(self) -> None:
        """The run is done: from here on nobody is missed."""
        self._stopped.set()

    def leave(self, error: BaseException) -> NoReturn:
        """End this process of several after `error`, which was printed if it is a SystemExit. The others are told."""
        if not isinstance(error, SystemExit):
            traceback.print_exception(error)
        if isinstance(error, jax.errors.JaxRuntimeError | ValueError):
            # What JAX raises when another process dies while it works with it. The watch knows in a moment, and ends us too.
            self._stopped.wait(self._peer_timeout + 4 * self._beat)
        cause = error.__context__ if isinstance(error, SystemExit) and error.__context__ else error
        code = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1
        self.farewell(str(cause).split("\n")[0] or type(cause).__name__)
        self._exit(code)

    def farewell(self, why: str) -> None:
        """Tell the other processes, if there are any, why this one is about to end."""
        if self.n_processes == 1:
            return
        self._mine = {**self._mine, "failed": why}
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # no coordinator any more: it is missed by all
            self._publish()
        if self._process == 0:  # the others read it from here
            time.sleep(4 * self._beat)

    def _tell(self) -> None:
        while not self._stopped.is_set():
            try:
                self._publish()
                if self._process == 0:
                    found = self._state.client.key_value_dir_get(KEY)
                else:
                    found = [(f"{KEY}/0", self._state.client.key_value_try_get(f"{KEY}/0"))]
            except jax.errors.JaxRuntimeError:  # nothing heard: `_look` notices if it stays like that
                found = []
            now = time.monotonic()
            for key, value in found:
                if (process := int(key.rsplit("/", 1)[1])) in self._peers:
                    self._peers[process].hear(json.loads(value), now)
            self._stopped.wait(self._beat)

    def _publish(self) -> None:
        sign = json.dumps({**self._mine, "beat": time.monotonic()})
        self._state.client.key_value_set(f"{KEY}/{self._process}", sign, allow_overwrite=True)

    def _look(self) -> None:
        last = time.monotonic()
        while not self._stopped.wait(self._beat / 2):
            now = time.monotonic()
            if now - last > self._peer_timeout / 2:
                self._stood_still, self._awake_since = now - last, now
            last = now
            if verdict := self._verdict(now):
                if self._process == 0:
                    self._mine = {**self._mine, "verdict": verdict}
                    time.sleep(3 * self._beat)  # the others read it from here
                self._end(verdict)

    def _verdict(self, now: float) -> str | None:
        """What is wrong with the run, None if nothing is."""
        if self._process and (told := self._peers[0].sign["verdict"]):
            return told
        silent = [i for i, peer in self._peers.items() if now - peer.heard > self._peer_timeout]
        if silent and now - self._awake_since < self._peer_timeout:
            return f"this process stood still for {self._stood_still:.0f} s, and the others went on without it; resume the run"
        if silent:
            return (
                f"{_named(silent)} missing: got no sign of life for {self._peer_timeout:.0f} s, the last while "
                f"{self._peers[silent[0]].sign['place']}; see its log and its machine, and resume the run"
            )
        for i, peer in self._peers.items():  # one beat later, for what all find fault with all report themselves
            if peer.sign["failed"] is not None and now - peer.moved > self._beat:
                return f"process {i} ended: {peer.sign['failed']}; see its log, and resume the run"
        return self._stuck(now) if self._process == 0 and self._step_timeout is not None else None

    def _stuck(self, now: float) -> str | None:
        late = {i: peer.sign for i, peer in self._peers.items() if now - peer.moved > self._step_timeout}
        if not any(sign["timed"] for sign in late.values()):
            return None
        signs = {0: self._mine, **{i: peer.sign for i, peer in self._peers.items()}}
        least = min(sign["turn"] for sign in signs.values())
        behind = [i for i, sign in signs.items() if sign["turn"] == least]
        who = "all processes are" if len(behind) == len(signs) else _named(behind)
        return (
            f"{who} stuck: nothing went on for {self._step_timeout:.0f} s while {signs[behind[0]]['place']}; see the stacks in "
            "its log and resume the run, or raise --step-timeout if it only takes long"
        )

    def _aborted(self, _: int) -> None:
        """Called by C in the thread that aborts."""
        address, lost = self._state.coordinator_address, self._process and not self._coordinator_answers()
        if self._started is not None:
            seconds = time.monotonic() - self._started
            if lost:
                self._end(
                    f"hosts: got no answer from {address} in {seconds:.0f} s, expected process 0 there; start it, and see "
                    "whether this host reaches that address and port"
                )
            self._end(
                f"hosts: got not all of {self._state.num_processes} processes in {seconds:.0f} s; start each id from 0 to "
                f"{self._state.num_processes - 1} once, all with {address} as their coordinator"
            )
        if lost:
            self._end(
                f"process 0 is missing: got no answer from JAX's coordinator in it, at {address}; see its log and its "
                "machine, and resume the run"
            )
        faulthandler.dump_traceback()
        self._stopped.wait(
            self._peer_timeout + 4 * self._beat
        )  # XLA may abort when another process dies: the watch knows
        self.farewell("aborted")
        ctypes.CDLL(None).signal(signal.SIGABRT, 0)  # abort() ends the process when this returns

    def _coordinator_answers(self) -> bool:
        host, port = self._state.coordinator_address.rsplit(":", 1)
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=self._beat).close()
        except OSError:
            return False
        return True

    def _end(self, message: str) -> NoReturn:
        self._ending.acquire()  # kept: whoever comes second waits for the end
        faulthandler.dump_traceback()
        print(f"error: {message}", file=sys.stderr)
        self._exit(WorkerError.exit_code)

    def _exit(self, code: int) -> NoReturn:
        """At once: at its regular exit JAX would wait for processes that do not come."""
        for child in multiprocessing.active_children():
            child.kill()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _named(processes: list[int]) -> str:
    return f"process{'es' if len(processes) > 1 else ''} {', '.join(map(str, processes))} {'are' if len(processes) > 1 else 'is'}"
