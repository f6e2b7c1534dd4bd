"""The steps of a stage: read a batch, advance the state, log, save."""

import contextlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import optax
from jax.sharding import Mesh

from ml_mamba_jax import processes, sharding
from ml_mamba_jax.config import MLMambaConfig
from ml_mamba_jax.data.order import Order
from ml_mamba_jax.data.samples import Batch, n_images
from ml_mamba_jax.data.source import RecordSource
from ml_mamba_jax.model import MLMamba
from ml_mamba_jax.tokenizer import Tokenizer
from ml_mamba_jax.training.config import StageConfig, TrainConfig
from ml_mamba_jax.training.evaluation import Best, Evaluator
from ml_mamba_jax.training.finite import LeftOut
from ml_mamba_jax.training.flops import peak_flops, step_flops
from ml_mamba_jax.training.inputs import open_batches
from ml_mamba_jax.training.metrics import Progress, Work
from ml_mamba_jax.training.optimizer import make_optimizer, make_schedule
from ml_mamba_jax.training.profiling import ProfileWindow
from ml_mamba_jax.training.run_folder import Reached, items_of, save_state
from ml_mamba_jax.training.stages import join, split
from ml_mamba_jax.training.step import first_state, make_train_step, resumed_state
from ml_mamba_jax.training.stop import Stop, Stopped
from ml_mamba_jax.training.watch import Watch
from ml_mamba_jax.training.writers import NoLog, RunLog


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
    stop: Stop
    watch: Watch


class Resumed(NamedTuple):
    """Where a stage goes on: after `first` of its steps, with the optimizer's state and the best evaluation until then.

    `to_evaluate`: these parameters were to be evaluated when the run was stopped. `skipped`: bad records until then, by id.
    """

    first: int
    optimizer: optax.OptState
    best: Best | None
    to_evaluate: bool = False
    skipped: Mapping[str, str] | None = None


def take_stage(run: Run, log: RunLog | NoLog, number: int, params: dict, resumed: Resumed | None = None) -> dict:
    """Take the steps of stage `number`, or what is left of them, to its end; returns all parameters, and takes those given.

    Raises:
        NonFiniteError: NaN or infinity, in some steps in a row or in what was to be saved.
        Stopped: the run was asked to stop; what it has reached is saved.
    """
    config, stage, last, before = run.config, run.config.stages[number], run.lengths[number], sum(run.lengths[:number])
    optimizer = make_optimizer(stage.optim, run.model, last)
    schedule = make_schedule(stage.optim, last)
    trained, frozen = split(params, stage)
    del params
    if resumed is None:
        state, first, best = first_state(optimizer, trained, run.mesh), 0, None
    else:
        state, first, best = resumed_state(trained, resumed.optimizer, run.mesh), resumed.first, resumed.best
    train_step = make_train_step(run.model, optimizer, run.mesh, stage)
    _announce(run, number, trained, frozen)
    held_out = HeldOut(run, log, number, best)
    if resumed is not None and resumed.to_evaluate:
        held_out.evaluate(before + first, join(state.params, frozen))
    if first == last:
        return join(state.params, frozen)

    end = before + last
    source, order, part = run.data[number]["train"], run.orders[number], sharding.batch_part(run.mesh)
    skipped = resumed.skipped if resumed is not None else None
    with contextlib.ExitStack() as stack:
        stream = stack.enter_context(
            contextlib.closing(
                open_batches(stage, config.model, source, run.tokenizer, order, first, last, part, skipped)
            )
        )
        profile = config.profile if processes.is_first() else None
        window = stack.enter_context(contextlib.closing(ProfileWindow(run.folder / "profile", profile)))
        print("compiling the training step ...", flush=True)
        started, progress, left_out = time.perf_counter(), None, LeftOut()
        for step in range(before + first + 1, end + 1):
            run.watch.at(f"reading the batch of step {step}")
            batch = next(stream)
            run.watch.at(f"taking step {step}", timed=progress is not None)  # the first is compiled
            window.before(step)
            began = time.perf_counter()
            state, metrics = train_step(state, frozen, sharding.place_batch(batch, run.mesh))
            finite_gradient = metrics.pop("finite_gradient")
            metrics = {name: float(value) for name, value in metrics.items()}
            work = work_of(
                batch, config.model, stage, stream.waited + time.perf_counter() - began, stream.waited, part[1]
            )
            if metrics.pop("finite"):
                left_out.none()
                metrics["learning_rate"] = float(schedule(int(state.step) - 1))
            else:
                ids = [id for of_one in processes.gather(stream.ids) for id in of_one]
                left_out.one(step, metrics, finite_gradient, items_of(state, frozen), ids)
                metrics = {"left_out": ids}
            log.step(step, {"stage": stage.name, **metrics, "batch": stream.digest, **work._asdict()})
            if progress is None:
                print(f"compiled, first step done after {time.perf_counter() - started:.1f} s", flush=True)
                progress = Progress(step, sum(run.lengths), config.log_every, peak_of(config, run.mesh))
                stack.callback(progress.close)
                stack.enter_context(run.stop.waits())  # from here on there is something to save
            else:
                progress.update(step, metrics.get("loss"), work)
            is_best = held_out.is_due(step, end) and held_out.evaluate(step, join(state.params, frozen))
            reached = Reached(step, held_out.best, held_out.is_pending, stream.skipped or None)
            run.watch.at(f"saving or stopping after step {step}")
            if is_due := step % config.save_every == 0 or step == end or is_best:
                save_state(run.folder, state, frozen, config.keep, reached)
            if run.stop.requested():  # asked here, it is known of a signal during the save too
                if not is_due:
                    save_state(run.folder, state, frozen, config.keep, reached)
                raise Stopped(f"stopped after step {step}; go on with --resume")
    return join(state.params, frozen)


class HeldOut:
    """The evaluations of a stage, and the `best` of them. `is_pending`: one was cut short, for the run was asked to stop."""

    def __init__(self, run: Run, log: RunLog | NoLog, number: int, best: Best | None):
        self._run, self._log, self._stage, self.best, self.is_pending = run, log, run.config.stages[number], best, False
        self._evaluator = _evaluator(run, number)

    def is_due(self, step: int, end: int) -> bool:
        return self._evaluator is not None and (step % self._run.config.eval_every == 0 or step == end)

    def evaluate(self, step: int, params: dict) -> bool:
        """Evaluate and report; says whether it is the best so far."""
        self._run.watch.at(f"evaluating after step {step}")
        found = self._evaluator(params, self._run.stop)
        self.is_pending = found is None
        if found is None:
            return False
        now = Best(step, found.accuracy, found.loss)
        is_best = self.best is None or self.best.is_beaten_by(now)
        self.best = now if is_best else self.best
        self._log.evaluation(step, self._stage.name, found)
        print(f"step {step}: {'the best so far, ' if is_best else ''}held out {found.summary()}", flush=True)
        return is_best


def _evaluator(run: Run, number: int) -> Evaluator | None:
    """None where nothing is to be evaluated, or there is nothing to evaluate on."""
    config, stage, source = run.config, run.config.stages[number], run.data[number].get("test")
    if config.eval_every is None:
        return None
    if not source:
        print(f"{stage.name}: its data has no test split: not evaluated", flush=True)
        return None
    return Evaluator(
        run.model,
        run.tokenizer,
        run.mesh,
        stage,
        source,
        n=config.eval_records,
        batch_size=config.eval_batch_size,
        max_new_tokens=config.eval_new_tokens,
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
