"""Asked to stop: whatever a run is at, it ends soon, and goes on as if it had never been stopped."""

import os
import signal
import subprocess
import sys
import time

import pytest

import train
from ml_mamba_jax import checkpoint
from ml_mamba_jax.training import evals, loop
from ml_mamba_jax.training.stop import SIGNALS, Stop, Stopped
from tests.training import short_run

SECONDS = 5.0
"""From the signal to the end of the run, on this model."""
SECONDS_OF_A_PROCESS = 3 * SECONDS
"""To its end, which other processes on the machine may delay."""


def test_outside_of_the_steps_a_signal_ends_the_run_where_it_stands(capsys):
    with Stop() as stop:
        signal.raise_signal(signal.SIGTERM)
        pytest.fail("went on")
    assert stop.requested()
    assert capsys.readouterr().out == "stopped by SIGTERM\n"


@pytest.mark.parametrize("number", SIGNALS)
def test_between_steps_it_is_asked_for_and_the_second_one_does_not_wait(number):
    before = [signal.getsignal(n) for n in SIGNALS]
    with pytest.raises(KeyboardInterrupt), Stop() as stop, stop.waits():
        assert not stop.requested()
        signal.raise_signal(number)
        assert stop.requested()
        assert [signal.getsignal(n) for n in SIGNALS] == before
        signal.raise_signal(signal.SIGINT)


def test_errors_are_not_taken_for_a_stop():
    with pytest.raises(ZeroDivisionError), Stop():
        raise ZeroDivisionError
    with pytest.raises(Stopped):
        raise Stopped
    assert not issubclass(Stopped, Exception)


DEAF = """
import hashlib, threading
from ml_mamba_jax.training.stop import Stop
with Stop():
    threading.Timer(0.5, print, ["busy"], {"flush": True}).start()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
"""


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_what_python_cannot_interrupt(number):
    process = subprocess.Popen([sys.executable, "-c", DEAF], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "busy\n"
    process.send_signal(number)
    began = time.monotonic()
    try:
        said, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert (process.returncode, said) == (0, f"stopped by {number.name}\n")
    assert time.monotonic() - began < SECONDS_OF_A_PROCESS


class Interruption:
    """Makes the n-th call of a function send this process a signal, before or after what the function does."""

    def __init__(self, monkeypatch, place, name: str, number: int, call: int = 1, after: bool = False):
        self._function, self._number, self._call, self._after = getattr(place, name), number, call, after
        self.at: float | None = None
        monkeypatch.setattr(place, name, self)

    def __call__(self, *args, **kwargs):
        self._call -= 1
        if self._call == 0 and not self._after:
            self._send()
        result = self._function(*args, **kwargs)
        if self._call == 0 and self._after:
            self._send()
        return result

    def _send(self):
        self.at = time.perf_counter()
        signal.raise_signal(self._number)


def test_a_run_may_be_stopped_in_every_phase(tmp_path, monkeypatch, capsys):
    straight = short_run.recipe(tmp_path, eval_every=2, keep=9)
    stopped = short_run.recipe(tmp_path, eval_every=2, keep=9, runs=tmp_path / "stopped")
    term, interrupt = signal.SIGTERM, signal.SIGINT
    phases = [  # what is interrupted, by which signal, at which call; what the newest checkpoint is then
        ((train, "open_data", term), "stopped by SIGTERM", []),
        ((loop, "first_state", term), "stopped by SIGTERM", []),
        ((loop, "work_of", term, 2), "stopped after step 2", [2]),
        ((evals, "answer", interrupt, 2), "stopped after step 4", [2, 3, 4]),
        ((checkpoint, "save", term), "stopped after step 6", [2, 3, 4, 6]),
        ((loop, "work_of", interrupt, 2), "stopped after step 8", [2, 3, 4, 6, 8]),
        ((train, "evaluate", term), "stopped by SIGTERM", [2, 3, 4, 6, 8]),
    ]
    with short_run.quickly():
        short_run.take(straight)
        for place, said, steps in phases:
            with monkeypatch.context() as patch:
                interruption = Interruption(patch, *place)
                capsys.readouterr()
                short_run.take(stopped)
                assert time.perf_counter() - interruption.at < SECONDS, place
            assert said in capsys.readouterr().out.splitlines()[-1], place
            assert checkpoint.steps(stopped.runs / stopped.name) == steps, place
        short_run.take(stopped)
    short_run.assert_same_run(stopped, straight)


@pytest.mark.parametrize(
    "number, until, workers",
    [
        (signal.SIGTERM, "step 3/", 0),
        pytest.param(signal.SIGINT, "step 3/", 1, marks=pytest.mark.full),
        pytest.param(signal.SIGTERM, "compiling the training step", 1, marks=pytest.mark.full),
        pytest.param(signal.SIGINT, "compiling the training step", 0, marks=pytest.mark.full),
    ],
)
def test_the_process_ends_with_code_0(tmp_path, number, until, workers):
    """A signal to the whole process group, as a terminal or a scheduler sends it."""
    process = subprocess.Popen(
        short_run.command(tmp_path, "--steps=100000", f"--data.workers={workers}", "--log-every=1", "--save-every=999"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    next(line for line in process.stdout if line.startswith(until))
    os.killpg(process.pid, number)
    began = time.monotonic()
    said, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert time.monotonic() - began < SECONDS_OF_A_PROCESS
    steps = checkpoint.steps(tmp_path / "runs" / short_run.NAME)
    expected = f"stopped after step {steps[0]}; go on with --resume" if steps else f"stopped by {number.name}"
    assert bool(steps) == until.startswith("step")
    assert said.splitlines()[-1] == expected
