"""Train a recipe of `configs/`: python train.py PRESET [--field value ...]

Reads top to bottom: recipe -> mesh -> data -> parameters, new or restored -> stages -> evaluation. Everything is written to
`runs/NAME`: config, tokenizer, checkpoints, metrics.jsonl, loss.png, eval.json, samples.png, and an example to chat about.
"""

import contextlib
import dataclasses
import json
import os
import sys
import time

import jax

from configs import RECIPES
from ml_mamba_jax import checkpoint, processes, serialize, sharding
from ml_mamba_jax.errors import InputError, one_line_errors
from ml_mamba_jax.image import read_image
from ml_mamba_jax.training import evals, plots, stages
from ml_mamba_jax.training.cli import parse
from ml_mamba_jax.training.config import TrainConfig, check
from ml_mamba_jax.training.distributed import check_same, joined, meet
from ml_mamba_jax.training.dry_run import dry_run, simulate_devices
from ml_mamba_jax.training.initial import check_given, start_from, with_model_of_init
from ml_mamba_jax.training.inputs import fingerprints, open_data, open_order, open_tokenizer, row_lengths
from ml_mamba_jax.training.loop import Resumed, Run, take_stage
from ml_mamba_jax.training.metrics import read_metrics
from ml_mamba_jax.training.optimizer import make_optimizer
from ml_mamba_jax.training.run_folder import (
    check_inputs,
    find_start,
    load_reached,
    restore_state,
    write_inputs,
    write_recipe,
)
from ml_mamba_jax.training.step import abstract_params, abstract_state, init_params, make_model
from ml_mamba_jax.training.stop import Stop
from ml_mamba_jax.training.watch import Watch
from ml_mamba_jax.training.writers import check_installed, open_log

MAX_CPU_DEVICES = 8


def main() -> None:
    with one_line_errors():
        config = parse(RECIPES, sys.argv[1:])
        preset = next(RECIPES[name][1] for name in sys.argv[1:] if name in RECIPES)
        config = with_model_of_init(config, preset.model)
        check(config)
        if config.dry_run:
            mesh = sharding.make_mesh(**dataclasses.asdict(simulate_devices(config.mesh)))
            check_batches(config, mesh)
            dry_run(config, mesh)
        else:
            with joined(config) as watch, Stop(watch.farewell) as stop:
                train(config, stop, watch)


def use_cores(config: TrainConfig, n_processes: int) -> None:
    """Let a CPU appear as several devices, so that a batch is split over its cores: small models gain a third in speed."""
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    counts = range(min(os.cpu_count() or 1, MAX_CPU_DEVICES), 0, -1)
    fitting = (n for n in counts if all(s.batch_size % (n * n_processes * s.micro_batches) == 0 for s in config.stages))
    jax.config.update("jax_num_cpu_devices", next(fitting, 1))


def train(config: TrainConfig, stop: Stop, watch: Watch) -> None:
    folder = config.runs / config.name
    started = time.perf_counter()
    check_installed(config.writers)
    use_cores(config, watch.n_processes)
    meet(config)
    mesh = sharding.make_mesh(**dataclasses.asdict(config.mesh))
    check_batches(config, mesh)
    resumed_step = processes.from_first(lambda: find_start(folder, config))
    if not resumed_step:
        check_given(config)

    watch.at("preparing the data", timed=False)
    with processes.first_before_others("data"):
        data = tuple(open_data(stage.data) for stage in config.stages)
        tokenizer = open_tokenizer(config, folder, data[-1]["train"], resumed_step)
        orders = tuple(
            open_order(stage, config.model, splits["train"], tokenizer, config.seed + number)
            for number, (stage, splits) in enumerate(zip(config.stages, data, strict=True))
        )
    model = make_model(config)
    lengths = tuple(map(stages.length, config.stages, orders))
    run = Run(config, folder, mesh, model, tokenizer, data, orders, lengths, stop, watch)
    check_same({"checkpoints": checkpoint.steps(folder), "steps": lengths, **fingerprints(config, tokenizer, data)})
    watch.at("reading the parameters" if resumed_step else "starting with new parameters", timed=False)
    position, params, resumed = (
        restore(run, resumed_step) if resumed_step else (stages.Position(0, 0), begin(run), None)
    )

    n_params = sum(a.size for a in jax.tree.leaves(params))
    of_processes = f" of {n} processes" if (n := jax.process_count()) > 1 else ""
    print(
        f"{config.name}: {n_params:,} parameters on {mesh.size} {jax.devices()[0].platform} device(s){of_processes}",
        flush=True,
    )
    for stage, splits in zip(config.stages, data, strict=True):
        counts = ", ".join(f"{len(source):,} {split} records" for split, source in splits.items())
        print(f"data{f' of {stage.name}' if len(data) > 1 else ''}: {counts}", flush=True)
    if resumed_step:
        print(f"resumed after step {resumed_step}", flush=True)

    evaluated = resumed_step - 1 if resumed is not None and resumed.to_evaluate else resumed_step
    with contextlib.closing(open_log(folder, config, resumed_step, evaluated)) as log:
        for number in range(position.stage, len(lengths)):
            params = take_stage(run, log, number, params, resumed)
            resumed = None

    if processes.is_first():
        plots.loss_curve(read_metrics(folder / "metrics.jsonl"), folder / "loss.png")
    if "test" in data[-1]:
        evaluate(run, params)
    print(f"{folder}: done after {time.perf_counter() - started:.0f} s")


def begin(run: Run) -> dict:
    """The parameters that a new run starts from. Writes what does not change during the run."""
    config = run.config
    params, taken = start_from(config.init, config.model, init_params(run.model, run.mesh, config.seed))
    print("".join(f"init: {line}\n" for line in taken), end="", flush=True)
    if processes.is_first():
        checkpoint.write_model(run.folder, config.model, run.tokenizer)
        write_recipe(run.folder, config)
        write_inputs(run.folder, fingerprints(config, run.tokenizer, run.data))
    return params


def restore(run: Run, step: int) -> tuple[stages.Position, dict, Resumed | None]:
    """Where the run stands after `step` steps, all its parameters and, within a stage, what that goes on with."""
    check_inputs(run.folder, fingerprints(run.config, run.tokenizer, run.data))
    reached = load_reached(run.folder, step)
    position = stages.locate(step, run.lengths, stays=reached.to_evaluate)
    params, optimizer = abstract_params(run.model, run.mesh), None
    if position.step:
        stage, last = run.config.stages[position.stage], run.lengths[position.stage]
        trained, _ = stages.split(params, stage)
        optimizer = abstract_state(make_optimizer(stage.optim, run.model, last), trained, run.mesh).optimizer
    params, optimizer = restore_state(run.folder, step, params, optimizer)
    within = None
    if position.step:
        within = Resumed(position.step, optimizer, reached.best, reached.to_evaluate, reached.skipped)
    return position, params, within


def evaluate(run: Run, params: dict) -> None:
    """Answer the held-out questions, print and save the scores, and draw some of the answers."""
    folder, source = run.folder, run.data[-1]["test"]
    print(f"answering {len(source):,} held-out questions ...", flush=True)
    started = time.perf_counter()
    run.watch.at("answering the held-out questions", timed=False)
    params = sharding.copy_to_each_process(params, run.mesh)
    answers = evals.answer_together(
        run.model,
        params,
        run.tokenizer,
        source,
        batch_size=run.config.eval_batch_size,
        max_new_tokens=run.config.eval_new_tokens,
        form=run.config.stages[-1].data.form,
        skip=run.config.stages[-1].data.max_bad > 0,
    )
    if not processes.is_first():
        return
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


def check_batches(config: TrainConfig, mesh) -> None:
    for stage in config.stages:
        prefix = f"{stage.name}." if len(config.stages) > 1 else ""
        parts = stage.micro_batches * mesh.shape["data"] * mesh.shape["fsdp"]
        hosts = f", of {n} processes" if (n := jax.process_count()) > 1 else ""
        if stage.batch_size % parts:
            raise InputError(
                f"{prefix}batch_size: got {stage.batch_size}, expected a multiple of {parts} = micro_batches "
                f"{stage.micro_batches} x data {mesh.shape['data']} x fsdp {mesh.shape['fsdp']}{hosts}"
            )
        for n_tokens in row_lengths(stage.data, config.model):
            sharding.check_tokens(n_tokens, mesh)


if __name__ == "__main__":
    main()
