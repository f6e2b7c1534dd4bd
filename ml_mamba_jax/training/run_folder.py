"""The folder of a run: whether it may be used, what was saved in it, and where the run goes on."""

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import optax

from ml_mamba_jax import checkpoint, serialize
from ml_mamba_jax.errors import CheckpointError, InputError, NonFiniteError
from ml_mamba_jax.training.config import TrainConfig
from ml_mamba_jax.training.evaluation import Best
from ml_mamba_jax.training.finite import not_finite, shortened
from ml_mamba_jax.training.stages import join
from ml_mamba_jax.training.step import TrainState

RECIPE_FILE = "recipe.json"
INPUTS_FILE = "inputs.json"
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
    "strict",
    "data.folder",
    "data.workers",
)
"""What a resumed run may set anew: nothing of it changes the numbers any more, but for the rounding of another mesh."""


def find_start(folder: Path, config: TrainConfig) -> int:
    """The step to resume after, that of the newest whole checkpoint, or 0 for a new run.

    Raises:
        InputError: the folder holds a run and `--resume` was not asked for.
        CheckpointError: it holds a run of another recipe, with the fields that differ, or no checkpoint that is whole; with
            `--strict`, one that is not.
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
    if changed := serialize.differences(checkpoint.load_config(folder), config.model):
        raise CheckpointError(
            f"{folder / checkpoint.CONFIG_FILE}: differs from the run's recipe ({'; '.join(changed)}); bring it back"
        )
    return _newest_whole(folder, steps, config.strict)


def _newest_whole(folder: Path, steps: list[int], strict: bool) -> int:
    """Verifies the newest checkpoint and, while that is damaged, the one before, and sets the damaged ones aside."""
    damaged: dict[int, CheckpointError] = {}
    for step in reversed(steps):
        try:
            checkpoint.verify(folder, step)
        except CheckpointError as error:
            if strict:
                raise
            damaged[step] = error
            continue
        for number, error in damaged.items():
            print(f"{error}; set aside as {checkpoint.set_aside(folder, number)}", file=sys.stderr, flush=True)
        if damaged:
            print(f"going back to step {step}, the newest checkpoint that is whole", file=sys.stderr, flush=True)
        return step
    raise CheckpointError(
        f"{folder}: none of {len(damaged)} checkpoints is whole: {'; '.join(map(str, damaged.values()))}"
    )


def _may_change(difference: str) -> bool:
    return re.sub(r"^stages\.\d+\.", "", difference.split(":")[0]).startswith(MAY_CHANGE)


def write_recipe(folder: Path, config: TrainConfig) -> None:
    serialize.write_text(folder / RECIPE_FILE, serialize.to_json(config))


def write_inputs(folder: Path, fingerprints: Mapping[str, str]) -> None:
    serialize.write_text(folder / INPUTS_FILE, json.dumps(dict(fingerprints), indent=2) + "\n")


def check_inputs(folder: Path, fingerprints: Mapping[str, str]) -> None:
    """Raise CheckpointError where the data or the tokenizer are not those that the run was started with; names both."""
    path = folder / INPUTS_FILE
    try:
        old = dict(json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{path}: found no record of the data and the tokenizer that the run was started with; choose another --name"
        ) from error
    names = sorted(old.keys() | fingerprints.keys())
    changed = [
        f"{name}: {old.get(name, 'none')} -> {fingerprints.get(name, 'none')}"
        for name in names
        if old.get(name) != fingerprints.get(name)
    ]
    if changed:
        raise CheckpointError(
            f"{path}: the run was started with other data or another tokenizer ({'; '.join(changed)}); bring them back or choose "
            "another --name"
        )


class Reached(NamedTuple):
    """What a checkpoint knows of its run: the number of the next batch, the best evaluation of the stage until then, whether the
    parameters are still to be evaluated, because the run was stopped before that was done, and the stage's bad records so far, by
    id, with what is wrong with each. Of several processes those of the first."""

    next_batch: int
    best: Best | None = None
    to_evaluate: bool = False
    skipped: dict[str, str] | None = None


def items_of(state: TrainState, frozen: dict) -> dict[str, Any]:
    """What a checkpoint holds of a state."""
    return {checkpoint.PARAMS: join(state.params, frozen), OPTIMIZER: state.optimizer}


def save_state(folder: Path, state: TrainState, frozen: dict, keep: int, reached: Reached) -> None:
    """A checkpoint: all parameters, and the optimizer of the stage. The best one is kept too.

    Raises:
        NonFiniteError: NaN or infinity in one of them; nothing is written.
    """
    items = items_of(state, frozen)
    if bad := not_finite(items):
        raise NonFiniteError(
            f"step {reached.next_batch}: got NaN or infinity in {shortened(bad)}, expected finite numbers to save; "
            "go on from the newest checkpoint with --resume"
        )
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
    """All parameters and the optimizer's state like these abstract ones; no optimizer where a new stage begins.

    Of a checkpoint that `find_start` found whole.
    """
    targets = {checkpoint.PARAMS: params} | ({} if optimizer is None else {OPTIMIZER: optimizer})
    restored = checkpoint.restore(folder, step, targets, verified=True)
    return restored[checkpoint.PARAMS], restored.get(OPTIMIZER)
