"""The folder of a run: whether it may be used, what was saved in it, and where the run goes on."""

import re
from pathlib import Path
from typing import NamedTuple

import optax

from ml_mamba_jax import checkpoint, serialize
from ml_mamba_jax.errors import CheckpointError, InputError
from ml_mamba_jax.training.config import TrainConfig
from ml_mamba_jax.training.evaluation import Best
from ml_mamba_jax.training.stages import join
from ml_mamba_jax.training.step import TrainState

RECIPE_FILE = "recipe.json"
OPTIMIZER = "optimizer"
MAY_CHANGE = (
    "mesh",
    "hosts",
    "step_timeout",
    "init",
    "from_scratch",
    "log_every",
    "save_every",
    "keep",
    "eval_",
    "writers",
    "runs",
    "dry_run",
    "device_memory",
    "peak_tflops",
    "profile",
    "resume",
    "data.folder",
    "data.workers",
)
"""What a resumed run may set anew: nothing of it changes the numbers any more, but for the rounding of another mesh."""


def find_start(folder: Path, config: TrainConfig) -> int:
    """The step to resume after, 0 for a new run.

    Raises:
        InputError: the folder holds a run and `--resume` was not asked for.
        CheckpointError: it holds a run of another recipe; lists the fields that differ.
    """
    steps = checkpoint.steps(folder)
    if not steps:
        return 0
    if not config.resume:
        raise InputError(f"{folder}: holds a run at step {steps[-1]}; pass --resume to go on, or another --name")
    path = folder / RECIPE_FILE
    if not path.is_file():
        raise CheckpointError(f"{path}: found no recipe beside the checkpoints; choose another --name")
    old = serialize.from_json(TrainConfig, path.read_text(encoding="utf-8"), str(path))
    changed = [line for line in serialize.differences(old, config) if not _may_change(line)]
    if changed:
        raise CheckpointError(
            f"{path}: the run was started with another recipe ({'; '.join(changed)}); choose another --name"
        )
    return steps[-1]


def _may_change(difference: str) -> bool:
    return re.sub(r"^stages\.\d+\.", "", difference.split(":")[0]).startswith(MAY_CHANGE)


def write_recipe(folder: Path, config: TrainConfig) -> None:
    serialize.write_text(folder / RECIPE_FILE, serialize.to_json(config))


class Reached(NamedTuple):
    """What a checkpoint knows of its run: the number of the next batch, the best evaluation of the stage until then, and whether
    the parameters are still to be evaluated, because the run was stopped before that was done."""

    next_batch: int
    best: Best | None = None
    to_evaluate: bool = False


def save_state(folder: Path, state: TrainState, frozen: dict, keep: int, reached: Reached) -> None:
    """A checkpoint: all parameters, and the optimizer of the stage. The best one is kept too."""
    items = {checkpoint.PARAMS: join(state.params, frozen), OPTIMIZER: state.optimizer}
    best = reached.best
    progress = reached._replace(best=None if best is None else best._asdict())._asdict()
    checkpoint.save(folder, reached.next_batch, items, progress, keep, spare=() if best is None else (best.step,))


def load_reached(folder: Path, step: int) -> Reached:
    saved = checkpoint.load_progress(folder, step)
    best = saved.get("best")
    return Reached(**saved | {"best": None if best is None else Best(**best)})


def restore_state(
    folder: Path, step: int, params: dict, optimizer: optax.OptState | None
) -> tuple[dict, optax.OptState | None]:
    """All parameters and the optimizer's state like these abstract ones; no optimizer where a new stage begins."""
    targets = {checkpoint.PARAMS: params} | ({} if optimizer is None else {OPTIMIZER: optimizer})
    restored = checkpoint.restore(folder, step, targets)
    return restored[checkpoint.PARAMS], restored.get(OPTIMIZER)
