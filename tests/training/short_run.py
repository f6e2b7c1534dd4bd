"""A run of a few steps of a small model, whose moments a test can reach.

With `take` in this process, with `command` in one of its own.
"""

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import jax
import numpy as np

import train
from configs import PRESETS
from ml_mamba_jax import checkpoint, sharding
from ml_mamba_jax.training import loop, plots
from ml_mamba_jax.training.config import OptimConfig, StageConfig, TrainConfig
from ml_mamba_jax.training.metrics import read_metrics
from ml_mamba_jax.training.run_folder import OPTIMIZER
from ml_mamba_jax.training.stop import Stop
from ml_mamba_jax.training.watch import Watch
from tests.training.test_stages import SMALL

NAME = "short"


def recipe(folder: Path, steps: int = 8, **changes) -> TrainConfig:
    """Of one stage. Its data is kept in `folder`, its run in `folder / "runs"`."""
    digits = PRESETS["digits-vqa"]
    data = dataclasses.replace(digits.stages[0].data, folder=folder / "data", train_scenes=20, test_scenes=1)
    optim = OptimConfig(peak_lr=1e-2, warmup=0.0)
    stage = StageConfig("s", trains=("connector", "language"), data=data, optim=optim, steps=steps, batch_size=8)
    config = dataclasses.replace(
        digits, name=NAME, model=SMALL, stages=(stage,), save_every=3, eval_batch_size=8, runs=folder / "runs"
    )
    return dataclasses.replace(config, **changes)


@contextlib.contextmanager
def quickly(n_devices: int = 1) -> Iterator[None]:
    """On the first devices, without pictures, and with one compilation for all runs of one recipe on one mesh."""
    with (
        mock.patch.object(
            sharding, "make_mesh", functools.partial(sharding.make_mesh, devices=jax.devices()[:n_devices])
        ),
        mock.patch.object(plots, "loss_curve"),
        mock.patch.object(plots, "answer_grid"),
        mock.patch.object(loop, "make_train_step", _Once(loop.make_train_step)),
    ):
        yield


class _Once:
    def __init__(self, function):
        self._function, self._made = function, {}

    def __call__(self, model, optimizer, mesh, stage):
        if mesh not in self._made:
            self._made[mesh] = self._function(model, optimizer, mesh, stage)
        return self._made[mesh]


def take(config: TrainConfig) -> None:
    """Start the run, or go on with it."""
    with Stop() as stop:
        train.train(dataclasses.replace(config, resume=True), stop, Watch(peer_timeout=60.0))


def losses(config: TrainConfig) -> list[tuple[int, str, str]]:
    """Of every step: its number, the digest of the samples it learnt from, and its loss bit by bit."""
    lines = read_metrics(config.runs / config.name / "metrics.jsonl")
    return [(line["step"], line["batch"], float(line["loss"]).hex()) for line in lines]


def arrays(config: TrainConfig, step: int | None = None) -> dict:
    """All that a checkpoint holds, by default the newest one: parameters and optimizer."""
    folder, here = config.runs / config.name, jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def as_saved(saved):
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here), saved)

    items = {checkpoint.PARAMS: as_saved, OPTIMIZER: as_saved}
    return jax.tree.map(np.asarray, checkpoint.restore(folder, step or checkpoint.newest_step(folder), items))


def assert_same_run(left: TrainConfig, right: TrainConfig) -> None:
    """Every loss, every evaluation, and all arrays of the last checkpoint, bit by bit."""
    assert losses(left) == losses(right)
    one, other = (config.runs / config.name / "evals.jsonl" for config in (left, right))
    assert one.is_file() == other.is_file() and (not one.is_file() or one.read_text() == other.read_text())
    jax.tree.map(np.testing.assert_array_equal, arrays(left), arrays(right))


def command(folder: Path, *options: str) -> list[str]:
    """`train.py` as its users start it, in a process of its own, with this recipe."""
    return [sys.executable, "-m", "tests.training.short_run", str(folder), *options]


def main() -> None:
    folder, *options = sys.argv[1:]
    with quickly(), mock.patch.dict(train.RECIPES, {NAME: ("a few steps", recipe(Path(folder)))}):
        sys.argv[1:] = [NAME, *options]
        train.main()


if __name__ == "__main__":
    main()
