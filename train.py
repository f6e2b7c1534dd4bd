"""Train a recipe of `configs/`: python train.py PRESET [--field value ...]

Reads top to bottom: recipe -> data -> model on a mesh -> state, new or resumed -> loop -> evaluation. Everything is written to
`runs/NAME`: config, tokenizer, checkpoints, metrics.jsonl, loss.png, eval.json, samples.png, and an example to chat about.
"""

import dataclasses
import json
import os
import sys
import time
from pathlib import Path

import jax

from configs import PRESETS
from ml_mamba_jax import checkpoint, serialize, sharding
from ml_mamba_jax.data import builders
from ml_mamba_jax.data.loader import batches
from ml_mamba_jax.data.source import RecordSource
from ml_mamba_jax.errors import CheckpointError, InputError, NonFiniteError, one_line_errors
from ml_mamba_jax.image import read_image
from ml_mamba_jax.model import MLMamba
from ml_mamba_jax.prompt import render
from ml_mamba_jax.tokenizer import Tokenizer
from ml_mamba_jax.training import evals, plots
from ml_mamba_jax.training.cli import parse
from ml_mamba_jax.training.config import TrainConfig, check
from ml_mamba_jax.training.initial import start_from, tokenizer_of
from ml_mamba_jax.training.metrics import MetricsLog, Progress, read_metrics
from ml_mamba_jax.training.optimizer import make_optimizer, make_schedule
from ml_mamba_jax.training.step import TrainState, abstract_state, init_state, make_train_step

RECIPE_FILE = "recipe.json"
MAX_CPU_DEVICES = 8
TOKENIZER_RECORDS = 4000
"""Records, spread over the training split, that a tokenizer is trained on."""
MAY_CHANGE = (
    "mesh",
    "log_every",
    "save_every",
    "keep",
    "eval_batch_size",
    "runs",
    "resume",
    "data.folder",
    "data.workers",
)
"""What a resumed run may set anew: nothing of it changes the numbers, but for the rounding of another mesh."""


def main() -> None:
    with one_line_errors():
        config = parse({name: (_summary(name), preset) for name, preset in PRESETS.items()}, sys.argv[1:])
        check(config)
        use_cores(config)
        train(config)


def use_cores(config: TrainConfig) -> None:
    """Let a CPU appear as several devices, so that a batch is split over its cores: small models gain a third in speed."""
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    counts = range(min(os.cpu_count() or 1, MAX_CPU_DEVICES), 0, -1)
    fitting = (n for n in counts if config.batch_size % (n * config.micro_batches) == 0)
    jax.config.update("jax_num_cpu_devices", next(fitting, 1))


def train(config: TrainConfig) -> None:
    folder = config.runs / config.name
    started = time.perf_counter()
    mesh = sharding.make_mesh(**dataclasses.asdict(config.mesh))
    check_batch(config, mesh)
    resumed_step = find_start(folder, config)

    splits = open_data(config)
    tokenizer = open_tokenizer(config, folder, splits["train"], resumed_step)
    model = MLMamba(config.model, remat=config.remat)
    optimizer = make_optimizer(config.optim, model, config.steps)
    target = abstract_state(model, optimizer, mesh)
    if resumed_step:
        state = restore_state(folder, resumed_step, target)
    else:
        place = jax.tree.map(lambda a: a.sharding, target)
        state = jax.jit(lambda key: init_state(model, optimizer, key), out_shardings=place)(jax.random.key(config.seed))
        params, taken = start_from(config.init, config.model, state.params)
        state = state._replace(params=params)
        print("".join(f"init: {line}\n" for line in taken), end="", flush=True)
        checkpoint.write_model(folder, config.model, tokenizer)
        serialize.write_text(folder / RECIPE_FILE, serialize.to_json(config))

    n_params = sum(a.size for a in jax.tree.leaves(state.params))
    print(f"{config.name}: {n_params:,} parameters on {mesh.size} {jax.devices()[0].platform} device(s)", flush=True)
    print(f"data: {', '.join(f'{len(source):,} {split} records' for split, source in splits.items())}", flush=True)
    if resumed_step:
        print(f"resumed after step {resumed_step}", flush=True)

    if resumed_step < config.steps:
        state = loop(config, folder, model, optimizer, mesh, state, splits["train"], tokenizer, resumed_step)
    plots.loss_curve(read_metrics(folder / "metrics.jsonl"), folder / "loss.png")
    if "test" in splits:
        evaluate(config, folder, model, state.params, tokenizer, splits["test"])
    print(f"{folder}: done after {time.perf_counter() - started:.0f} s")


def loop(config, folder, model, optimizer, mesh, state: TrainState, source, tokenizer, first: int) -> TrainState:
    """Take the steps from `first` to the end, logging each and saving some."""
    train_step = make_train_step(model, optimizer, mesh, config.micro_batches)
    schedule = make_schedule(config.optim, config.steps)
    stream = batches(
        source,
        tokenizer,
        config.model,
        batch_size=config.batch_size,
        max_tokens=config.data.max_tokens,
        seed=config.seed,
        first=first,
        last=config.steps,
        form=config.data.form,
        workers=config.data.workers,
    )
    log = MetricsLog(folder / "metrics.jsonl", first)
    print("compiling the training step ...", flush=True)
    started, progress = time.perf_counter(), None
    try:
        for step, batch in enumerate(stream, start=first + 1):
            tokens = int(batch.lengths.sum()) + batch.tokens.shape[0] * config.model.n_visual_tokens
            state, metrics = train_step(state, jax.device_put(batch, sharding.batch_sharding(mesh)))
            metrics = {name: float(value) for name, value in metrics.items()}
            if not metrics.pop("finite"):
                raise NonFiniteError(
                    f"step {step}: got loss {metrics['loss']} and gradient norm {metrics['gradient_norm']}, expected finite "
                    "numbers; the parameters are those of the step before; lower --optim.peak-lr or look at the data"
                )
            metrics["learning_rate"] = float(schedule(step - 1))
            log.write(step, metrics)
            if progress is None:
                print(f"compiled, first step done after {time.perf_counter() - started:.1f} s", flush=True)
                progress = Progress(step, config.steps, config.log_every)
            else:
                progress.update(step, metrics["loss"], tokens)
            if step % config.save_every == 0 or step == config.steps:
                save_state(folder, step, state, config.keep)
    finally:
        stream.close()
        log.close()
        if progress is not None:
            progress.close()
    return state


def evaluate(
    config: TrainConfig, folder: Path, model: MLMamba, params: dict, tokenizer: Tokenizer, source: RecordSource
) -> None:
    """Answer the held-out questions, print and save the scores, and draw some of the answers."""
    print(f"answering {len(source):,} held-out questions ...", flush=True)
    started = time.perf_counter()
    answers = evals.answer(model, params, tokenizer, source, batch_size=config.eval_batch_size)
    scores = evals.score(answers)
    serialize.write_text(
        folder / "eval.json", json.dumps({kind: s._asdict() for kind, s in scores.items()}, indent=2) + "\n"
    )
    plots.answer_grid(answers, folder / "samples.png")
    example = max(answers, key=lambda item: len(item.record.image or b""))  # of all pictures the one with most to see
    if example.record.image is not None:
        read_image(example.record.image).save(folder / "example.png")
        serialize.write_text(folder / "example.txt", example.question + "\n")
    print(f"{evals.table(scores)}\n({time.perf_counter() - started:.0f} s)", flush=True)


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
    changed = [line for line in serialize.differences(old, config) if not line.split(":")[0].startswith(MAY_CHANGE)]
    if changed:
        raise CheckpointError(
            f"{path}: the run was started with another recipe ({'; '.join(changed)}); choose another --name"
        )
    return steps[-1]


def open_data(config: TrainConfig) -> dict[str, RecordSource]:
    """The splits of the data set, prepared on disk if they were not: "train", and "test" where there is one."""
    data = config.data
    if data.json_file is None:
        builder = builders.prepare_digits(data.folder, data.train_scenes, data.test_scenes)
    else:
        builder = builders.prepare_llava(data.folder, data.json_file, data.image_folder or data.json_file.parent)
    return {split: RecordSource(builder, split) for split in builder.info.splits}


def open_tokenizer(config: TrainConfig, folder: Path, source: RecordSource, resumed_step: int) -> Tokenizer:
    """The recipe's tokenizer, or one trained on the training text; a resumed run keeps its own."""
    vocab_size, prompt_format = config.model.language.vocab_size, config.model.prompt_format
    if resumed_step:
        return Tokenizer.from_pretrained(folder)
    if source_of_tokenizer := config.tokenizer or tokenizer_of(config.init):
        tokenizer = Tokenizer.from_pretrained(source_of_tokenizer)
    else:
        records = (source[i] for i in range(0, len(source), -(-len(source) // TOKENIZER_RECORDS)))
        texts = (piece.text for record in records for piece in render(record.turns, prompt_format))
        tokenizer = Tokenizer.train(texts, vocab_size, prompt_format)
    if tokenizer.vocab_size > vocab_size:
        raise InputError(
            f"tokenizer: got {tokenizer.vocab_size} entries, expected at most the model's {vocab_size}; "
            f"pass --model.language.vocab-size {tokenizer.vocab_size}"
        )
    tokenizer.end_id(prompt_format)  # only for its check
    return tokenizer


def check_batch(config: TrainConfig, mesh) -> None:
    parts = config.micro_batches * mesh.shape["data"] * mesh.shape["fsdp"]
    if config.batch_size % parts:
        raise InputError(
            f"batch_size: got {config.batch_size}, expected a multiple of {parts} = micro_batches {config.micro_batches} x "
            f"data {mesh.shape['data']} x fsdp {mesh.shape['fsdp']}"
        )


def save_state(folder: Path, step: int, state: TrainState, keep: int) -> None:
    checkpoint.save(folder, step, {"params": state.params, "optimizer": state.optimizer}, {"next_batch": step}, keep)


def restore_state(folder: Path, step: int, target: TrainState) -> TrainState:
    restored = checkpoint.restore(folder, step, {"params": target.params, "optimizer": target.optimizer})
    return TrainState(jax.device_put(jax.numpy.int32(step), target.step.sharding), **restored)


def _summary(name: str) -> str:
    module = sys.modules[f"configs.{name.replace('-', '_')}"]
    return (module.__doc__ or "").splitlines()[0]


if __name__ == "__main__":
    main()
