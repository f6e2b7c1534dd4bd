"""The log of a run: one JSON object per step in `metrics.jsonl`, and progress on the terminal."""

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ml_mamba_jax import processes
from ml_mamba_jax.serialize import write_text


class MetricsLog:
    """Appends one line per step. A resumed run keeps the lines up to its first step and drops what came after."""

    def __init__(self, path: Path, first_step: int):
        kept = [line for line in read_metrics(path) if line["step"] <= first_step] if first_step else []
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._path, self._file = path, path.open("ab", buffering=0)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        line = (json.dumps({"step": step, **values}) + "\n").encode()
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from error

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict]:
    """The lines of a log, without a last one that was cut off."""
    if not path.is_file():
        return []
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


class Work(NamedTuple):
    """What a step did. `seconds` of wall time, of which `waited` for its batch; `tokens` of text and images, without padding;
    `flops` of the model for these, see `ml_mamba_jax.training.flops`."""

    seconds: float
    waited: float
    tokens: int
    flops: int


INPUT_BOUND = 0.2
"""Part of the time from which on waiting for data is called out."""


class Progress:
    """A progress bar on a terminal, a line every `log_every` steps elsewhere: loss, tokens per second, MFU, time left.

    Speeds are those since the last line. `peak`: FLOP/s of all devices together, None if not known.
    """

    def __init__(self, first_step: int, steps: int, log_every: int, peak: float | None = None):
        self._first, self._steps, self._log_every, self._peak = first_step, steps, log_every, peak
        self._start = time.perf_counter()
        self._losses: list[float] = []
        self._work: list[Work] = []
        self._bar = None
        if sys.stderr.isatty() and processes.is_first():
            from tqdm import tqdm

            self._bar = tqdm(total=steps, initial=first_step, unit="step", dynamic_ncols=True)

    def update(self, step: int, loss: float | None, work: Work) -> None:
        """Report that optimizer step number `step` of the run is done; `loss` is None if it was left out."""
        self._losses += [] if loss is None else [loss]
        self._work.append(work)
        due = step % self._log_every == 0 or step == self._steps
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {_mean(self._losses[-20:])}, {', '.join(self._speed())}", refresh=False)
            self._bar.update()
        elif due:
            left = (time.perf_counter() - self._start) / (step - self._first) * (self._steps - step)
            line = [f"step {step}/{self._steps}", f"loss {_mean(self._losses)}", *self._speed(), f"{_clock(left)} left"]
            print("  ".join(line), flush=True)
        if due:
            self._losses, self._work = [], []

    def _speed(self) -> list[str]:
        seconds, waited, tokens, flops = (sum(values) for values in zip(*self._work, strict=True))
        words = [f"{tokens / seconds:,.0f} tokens/s"]
        if self._peak is not None:
            words.append(f"MFU {flops / seconds / self._peak:.1%}")
        if waited > INPUT_BOUND * seconds:
            words.append(f"waits for data {waited / seconds:.0%} of the time: raise data.workers")
        return words

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _mean(losses: list[float]) -> str:
    return f"{sum(losses) / len(losses):.4f}" if losses else "unknown"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes}:{seconds:02d}"
