"""The log of a run: one JSON object per step in `metrics.jsonl`, and progress on the terminal."""

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from ml_mamba_jax.serialize import write_text


class MetricsLog:
    """Appends one line per step. A resumed run keeps the lines up to its first step and drops what came after."""

    def __init__(self, path: Path, first_step: int):
        kept = [line for line in read_metrics(path) if line["step"] <= first_step] if first_step else []
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file: IO[str] = path.open("a", encoding="utf-8")

    def write(self, step: int, values: Mapping[str, float | str]) -> None:
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()

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


class Progress:
    """A progress bar on a terminal, a line every `log_every` steps elsewhere: loss, tokens per second, time left."""

    def __init__(self, first_step: int, steps: int, log_every: int):
        self._first, self._steps, self._log_every = first_step, steps, log_every
        self._start = time.perf_counter()
        self._tokens, self._losses = 0, []
        self._bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=steps, initial=first_step, unit="step", dynamic_ncols=True)

    def update(self, step: int, loss: float, tokens: int) -> None:
        """Report that optimizer step number `step` is done, with its loss and the tokens it read."""
        self._tokens += tokens
        self._losses.append(loss)
        seconds = time.perf_counter() - self._start
        speed = self._tokens / seconds
        if self._bar is not None:
            recent = self._losses[-20:]
            self._bar.set_postfix_str(f"loss {sum(recent) / len(recent):.4f}, {speed:,.0f} tokens/s", refresh=False)
            self._bar.update()
        elif step % self._log_every == 0 or step == self._steps:
            left = seconds / (step - self._first) * (self._steps - step)
            mean = sum(self._losses) / len(self._losses)
            self._losses = []
            print(f"step {step}/{self._steps}  loss {mean:.4f}  {speed:,.0f} tokens/s  {_clock(left)} left", flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes}:{seconds:02d}"
