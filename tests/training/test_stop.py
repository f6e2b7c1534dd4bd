"""Asked to stop: whatever a run is at, it ends soon, and goes on as if it had never been stopped."""

import os
import signal
import subprocess
import time

import pytest

import train
from ml_mamba_jax import checkpoint
from ml_mamba_jax.training import evals, loop
from ml_mamba_jax.training.stop import SIGNALS, Stop, Stopped
from tests.training import short_run
from tests.training.test_train import ROOT, SMALL, command

SECONDS = 5.0
"""From the signal to the end of the run, on this model."""


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


@pytest.mark.parametrize("workers", [0, 1])
def test_the_process_ends_with_code_0(tmp_path, workers):
    """A signal to the whole process group, as a terminal or a scheduler sends it."""
    process = subprocess.Popen(
        command(tmp_path, *SMALL, "--steps=100000", f"--data.workers={workers}"),
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    log = tmp_path / "runs" / "digits-vqa" / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not log.is_file() or log.read_bytes().count(b"\n") < 3:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT if workers else signal.SIGTERM)
    began = time.monotonic()
    said, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert time.monotonic() - began < 2 * SECONDS
    (step,) = checkpoint.steps(tmp_path / "runs" / "digits-vqa")
    assert said.splitlines()[-1] == f"stopped after step {step}; go on with --resume"
