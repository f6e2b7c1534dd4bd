"""One of several processes that train a small model: `python -m tests.training.hosts_run OPTIONS`.

Process i writes the ids of the records in each batch that it reads to `ids-i.jsonl` in the run's folder.
"""

import dataclasses
import functools
import json
from pathlib import Path

import tyro

import train
from configs import PRESETS
from ml_mamba_jax.data.loader import BatchStream
from ml_mamba_jax.data.order import Batching
from ml_mamba_jax.errors import one_line_errors
from ml_mamba_jax.training import loop
from ml_mamba_jax.training.config import HostsConfig, MeshConfig, OptimConfig, StageConfig, TrainConfig
from ml_mamba_jax.training.distributed import joined
from ml_mamba_jax.training.stop import Stop


@dataclasses.dataclass(frozen=True)
class Options:
    folder: Path
    runs: Path
    steps: int
    hosts: HostsConfig = dataclasses.field(default_factory=HostsConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    batching: Batching = "random"
    eval_every: int | None = None
    save_every: int = 1000
    sees: bool = True
    """Else the model reads text alone, compiles in a moment, and is asked nothing at the end."""


def recipe(options: Options) -> TrainConfig:
    """Of a small model with all parts; what learns has no parameter whose gradient is nothing but rounding."""
    digits = PRESETS["digits-vqa"]
    model = (
        digits.model.replace(vision=(), connector=None)
        if not options.sees
        else digits.model.replace(
            language=dataclasses.replace(digits.model.language, n_layers=1),
            connector=dataclasses.replace(digits.model.connector, scan="none"),
            vision=(dataclasses.replace(digits.model.vision[0], depth=2),),
        )
    )
    data = dataclasses.replace(
        digits.stages[0].data,
        folder=options.folder,
        train_scenes=24,
        test_scenes=1,
        batching=options.batching,
        row_length=64,
    )
    optim = OptimConfig(peak_lr=1e-3, warmup=0.0)
    stage = StageConfig(
        "s",
        trains=("connector", "language") if options.sees else ("language",),
        data=data,
        optim=optim,
        steps=options.steps,
        batch_size=8,
    )
    names = ("runs", "hosts", "mesh", "eval_every", "save_every")
    changes = {name: getattr(options, name) for name in names}
    return TrainConfig("small", model, (stage,), from_scratch=True, eval_batch_size=8, resume=True, **changes)


class Noted(BatchStream):
    """Batches whose ids are written down."""

    path: Path

    def __next__(self):
        batch = super().__next__()
        with self.path.open("a") as file:
            file.write(json.dumps(self.ids) + "\n")
        return batch


def open_noted(path: Path, open_batches, *args) -> BatchStream:
    stream = open_batches(*args)
    stream.__class__, stream.path = Noted, path
    return stream


def main() -> None:
    config = recipe(tyro.cli(Options))
    with one_line_errors(), joined(config) as watch, Stop(watch.farewell) as stop:
        path = config.runs / f"ids-{config.hosts.process_id or 0}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        if not config.model.vision:
            train.evaluate = lambda run, params: None
        loop.open_batches = functools.partial(open_noted, path, loop.open_batches)
        train.train(config, stop, watch)


if __name__ == "__main__":
    main()
