"""Where the numbers of a run go: JSON lines always, TensorBoard and Weights & Biases if asked for.

Every writer takes scalars and texts by name; what follows a step that a resumed run goes back to is dropped or written over.
"""

import importlib.util
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from ml_mamba_jax import processes, serialize
from ml_mamba_jax.errors import InputError
from ml_mamba_jax.training.config import TrainConfig
from ml_mamba_jax.training.evaluation import Evaluation
from ml_mamba_jax.training.metrics import MetricsLog

WriterName = Literal["tensorboard", "wandb"]
INSTALL = {"tensorboard": ("tensorboardX", "train"), "wandb": ("wandb", "wandb")}
"""The package of a writer, and the extra that installs it."""
WANDB_ID_FILE = "wandb_id"


class Writer(Protocol):
    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...

    def text(self, step: int, name: str, text: str) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in `tensorboard/` of the run's folder."""

    def __init__(self, folder: Path, config: TrainConfig, first_step: int):
        from tensorboardX import SummaryWriter

        purge = first_step + 1 if first_step else None
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=purge)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def text(self, step: int, name: str, text: str) -> None:
        self._writer.add_text(name, text.replace("\n", "  \n"), step)  # Markdown's line ends

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run named as its folder is; a resumed one goes on under the id that is kept in the folder.

    Weights & Biases keeps the first numbers that it hears of a step: those of steps that are taken again are dropped there.
    """

    def __init__(self, folder: Path, config: TrainConfig, first_step: int):
        import wandb

        path = folder / WANDB_ID_FILE
        if not first_step or not path.is_file():
            serialize.write_text(path, f"{folder.name}-{uuid.uuid4().hex[:8]}\n")
        self._wandb = wandb
        self._run = wandb.init(
            project="ml-mamba-jax",
            name=config.name,
            id=path.read_text(encoding="utf-8").strip(),
            dir=str(folder),
            config=serialize.plain(config),
            resume="allow" if first_step else None,
        )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def text(self, step: int, name: str, text: str) -> None:
        self._run.log({name: self._wandb.Html(f"<pre>{text}</pre>")}, step=step)

    def close(self) -> None:
        self._run.finish()


WRITERS: dict[str, type] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}


class RunLog:
    """Everything that a run reports, to all its writers: `metrics.jsonl` a line per step, `evals.jsonl` one per evaluation.

    What was written of steps after `first_step` is dropped, and so are evaluations after the step `evaluated`.
    """

    def __init__(self, folder: Path, config: TrainConfig, first_step: int, evaluated: int | None = None):
        check_installed(config.writers)
        last_evaluated = first_step if evaluated is None else evaluated
        self._steps = MetricsLog(folder / "metrics.jsonl", first_step)
        self._evals = None if config.eval_every is None else MetricsLog(folder / "evals.jsonl", last_evaluated)
        self._others: list[Writer] = [WRITERS[name](folder, config, first_step) for name in config.writers]

    def step(self, step: int, values: Mapping[str, Any]) -> None:
        self._steps.write(step, values)
        numbers = {f"train/{name}": value for name, value in values.items() if isinstance(value, int | float)}
        for writer in self._others:
            writer.scalars(step, numbers)

    def evaluation(self, step: int, stage: str, found: Evaluation) -> None:
        self._evals.write(step, {"stage": stage, **found.plain()})
        for writer in self._others:
            writer.scalars(step, {f"eval/{name}": value for name, value in found.numbers().items()})
            writer.text(step, "eval/answers", found.samples())

    def close(self) -> None:
        for writer in (self._steps, self._evals, *self._others):
            if writer is not None:
                writer.close()


class NoLog:
    """In place of a `RunLog` in the processes of a run that leave reporting to process 0."""

    def step(self, step: int, values: Mapping[str, Any]) -> None:
        pass

    def evaluation(self, step: int, stage: str, found: Evaluation) -> None:
        pass

    def close(self) -> None:
        pass


def open_log(folder: Path, config: TrainConfig, first_step: int, evaluated: int | None = None) -> RunLog | NoLog:
    """The log of a run, the arguments as of `RunLog`. Close it when done."""
    return RunLog(folder, config, first_step, evaluated) if processes.is_first() else NoLog()


def check_installed(names: Sequence[str]) -> None:
    """Raise InputError for a writer whose package is missing."""
    for name in names:
        package, extra = INSTALL[name]
        if importlib.util.find_spec(package) is None:
            raise InputError(f"writers: got {name}, but {package} is not installed; pip install '.[{extra}]'")
