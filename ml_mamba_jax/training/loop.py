"""The steps of a stage: read a batch, advance the state, log, save."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from ml_mamba_jax import processes, sharding
from ml_mamba_jax.config import MLMambaConfig
from ml_mamba_jax.data.order import Order
from ml_mamba_jax.data.samples import Batch, n_images
from ml_mamba_jax.data.source import RecordSource
from ml_mamba_jax.errors import NonFiniteError
from ml_mamba_jax.model import MLMamba
from ml_mamba_jax.tokenizer import Tokenizer
from ml_mamba_jax.training.config import StageConfig, TrainConfig
from ml_mamba_jax.training.evaluation import Best, Evaluator
from ml_mamba_jax.training.flops import peak_flops, step_flops
from ml_mamba_jax.training.inputs import open_batches
from ml_mamba_jax.training.metrics import Progress, Work
from ml_mamba_jax.training.optimizer import make_optimizer, make_schedule
from ml_mamba_jax.training.profiling import ProfileWindow
from ml_mamba_jax.training.run_folder import save_state
from ml_mamba_jax.training.stages import join, split
from ml_mamba_jax.training.step import TrainState, first_state, make_train_step
from ml_mamba_jax.training.watch import Watch
from ml_mamba_jax.training.writers import RunLog


@dataclass(frozen=True)
class Run:
    """What the stages of a run share. Of each stage, `data`: the splits; `orders`: of the batches; `lengths`: the steps."""

    config: TrainConfig
    folder: Path
    mesh: Mesh
    model: MLMamba
    tokenizer: Tokenizer
    data: tuple[dict[str, RecordSource], ...]
    orders: tuple[Order, ...]
    lengths: tuple[int, ...]
    watch: Watch


class Resumed(NamedTuple):
    """Where a stage goes on: after `first` of its steps, with the optimizer's state and the best evaluation until then."""

    first: int
    optimizer: optax.OptState
    best: Best | None


def take_stage(run: Run, log: RunLog, number: int, params: dict, resumed: Resumed | None = None) -> dict:
    """Take the steps of stage `number`, or what is left of them, to its end; returns all parameters, and takes those given.

    Raises:
        NonFiniteError: a loss or gradient that is NaN or infinite.
    """
    config, stage, last, before = run.config, run.config.stages[number], run.lengths[number], sum(run.lengths[:number])
    optimizer = make_optimizer(stage.optim, run.model, last)
    schedule = make_schedule(stage.optim, last)
    trained, frozen = split(params, stage)
    del params
    if resumed is None:
        state, first, best = first_state(optimizer, trained, run.mesh), 0, None
    else:
        first, moments, best = resumed
        step = processes.place(np.int32(first), sharding.replicated(run.mesh))
        state = TrainState(step, trained, moments)
    train_step = make_train_step(run.model, optimizer, run.mesh, stage)
    _announce(run, number, trained, frozen)

    source, order, part = run.data[number]["train"], run.orders[number], sharding.batch_part(run.mesh)
    stream = open_batches(stage, config.model, source, run.tokenizer, order, first, last, part)
    evaluate = _evaluator(run, number)
    window = ProfileWindow(run.folder / "profile", config.profile if processes.is_first() else None)
    print("compiling the training step ...", flush=True)
    started, progress = time.perf_counter(), None
    try:
        for step in range(before + first + 1, before + last + 1):
            run.watch.at(f"reading the batch of step {step}")
            batch = next(stream)
            run.watch.at(f"taking step {step}", timed=progress is not None)  # the first is compiled
            window.before(step)
            began = time.perf_counter()
            state, metrics = train_step(state, frozen, sharding.place_batch(batch, run.mesh))
            metrics = {name: float(value) for name, value in metrics.items()}
            work = work_of(
                batch, config.model, stage, stream.waited + time.perf_counter() - began, stream.waited, part[1]
            )
            if not metrics.pop("finite"):
                raise NonFiniteError(
                    f"step {step}: got loss {metrics['loss']} and gradient norm {metrics['gradient_norm']}, expected finite "
                    "numbers; the parameters are those of the step before; lower optim.peak-lr or look at the data"
                )
            metrics["learning_rate"] = float(schedule(step - before - 1))
            log.step(step, {"stage": stage.name, **metrics, **work._asdict()})
            if progress is None:
                print(f"compiled, first step done after {time.perf_counter() - started:.1f} s", flush=True)
                progress = Progress(step, sum(run.lengths), config.log_every, peak_of(config, run.mesh))
            else:
                progress.update(step, metrics["loss"], work)
            is_last, is_best = step == before + last, False
            if evaluate is not None and (step % config.eval_every == 0 or is_last):
                run.watch.at(f"evaluating after step {step}")
                found = evaluate(join(state.params, frozen))
                now = Best(step, found.accuracy, found.loss)
                is_best = best is None or best.is_beaten_by(now)
                best = now if is_best else best
                log.evaluation(step, stage.name, found)
                print(f"step {step}: {'the best so far, ' if is_best else ''}held out {found.summary()}", flush=True)
            if step % config.save_every == 0 or is_last or is_best:
                run.watch.at(f"saving after step {step}")
                save_state(run.folder, step, state, frozen, config.keep, best)
    finally:
        window.close()
        stream.close()
        if progress is not None:
            progress.close()
    return join(state.params, frozen)


def _evaluator(run: Run, number: int) -> Evaluator | None:
    """None where nothing is to be evaluated, or there is nothing to evaluate on."""
    config, stage, source = run.config, run.config.stages[number], run.data[number].get("test")
    if config.eval_every is None:
        return None
    if not source:
        print(f"{stage.name}: its data has no test split: not evaluated", flush=True)
        return None
    return Evaluator(
        run.model, run.tokenizer, run.mesh, stage, source, n=config.eval_records, batch_size=config.eval_batch_size
    )


def work_of(
    batch: Batch, model: MLMambaConfig, stage: StageConfig, seconds: float, waited: float, parts: int = 1
) -> Work:
    """What a step did on a batch, of which this process read one of `parts` parts: tokens and images, without padding and the
    black pixels of rows without an image."""
    readers = jax.process_count() // parts  # of each part
    images, text = (n // readers for n in processes.total(n_images(batch), int(batch.lengths.sum())))
    return Work(seconds, waited, text + images * model.n_visual_tokens, step_flops(model, stage, images, text))


def peak_of(config: TrainConfig, mesh: Mesh) -> float | None:
    """FLOP/s of all devices of the mesh, None if not known."""
    of_one = peak_flops(mesh.devices.flat[0].device_kind) if config.peak_tflops is None else config.peak_tflops * 1e12
    return None if of_one is None else of_one * mesh.size


def _announce(run: Run, number: int, trained: dict, frozen: dict) -> None:
    n_trained, n_frozen = (sum(a.size for a in jax.tree.leaves(tree)) for tree in (trained, frozen))
    stage = run.config.stages[number]
    which = f"stage {number + 1} of {len(run.lengths)}, " if len(run.lengths) > 1 else ""
    print(
        f"{which}{stage.name}: {run.lengths[number]:,} steps of {stage.batch_size}, trains {', '.join(stage.trains)}: "
        f"{n_trained:,} of {n_trained + n_frozen:,} parameters",
        flush=True,
    )
