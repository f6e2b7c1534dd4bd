"""Evaluation during training: the loss on held-out records, and the answers to their questions."""

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from ml_mamba_jax import sharding
from ml_mamba_jax.config import MLMambaConfig
from ml_mamba_jax.data.records import Record
from ml_mamba_jax.data.samples import Batch, collate, make_sample
from ml_mamba_jax.errors import InputError
from ml_mamba_jax.model import MLMamba
from ml_mamba_jax.tokenizer import Tokenizer
from ml_mamba_jax.training import evals
from ml_mamba_jax.training.config import StageConfig
from ml_mamba_jax.training.losses import target_losses
from ml_mamba_jax.training.stop import Stop


class Best(NamedTuple):
    """The best evaluation of a stage so far: more right answers, or as many and a lower loss."""

    step: int
    accuracy: float
    loss: float

    def is_beaten_by(self, other: "Best") -> bool:
        return (other.accuracy, -other.loss) > (self.accuracy, -self.loss)


class Evaluation(NamedTuple):
    """`loss`: the mean over the target tokens of the records; `answers` to `shown` of them are printed."""

    loss: float
    answers: list[evals.Answer]
    shown: int = 4

    @property
    def accuracy(self) -> float:
        return evals.score(self.answers)["overall"].accuracy

    def numbers(self) -> dict[str, float]:
        scores = evals.score(self.answers)
        kinds = {f"accuracy/{kind}": score.accuracy for kind, score in scores.items() if kind != "overall"}
        return {"loss": self.loss, "accuracy": self.accuracy, **(kinds if len(kinds) > 1 else {})}

    def summary(self) -> str:
        """For the console."""
        return f"loss {self.loss:.4f}, {self.accuracy:.1%} of {len(self.answers)} right\n  " + self.samples().replace(
            "\n", "\n  "
        )

    def samples(self) -> str:
        """Some questions with answer and, where that is wrong, what was expected; the same ones each time."""
        chosen = np.linspace(0, len(self.answers) - 1, min(self.shown, len(self.answers))).astype(int)
        return "\n".join(_as_line(self.answers[i]) for i in chosen)

    def plain(self) -> dict[str, Any]:
        """For a line of JSON."""
        return {**self.numbers(), "samples": self.samples().splitlines()}


def _as_line(item: evals.Answer) -> str:
    question, expected, prediction = (
        " ".join(text.split())[:200] for text in (item.question, item.expected, item.prediction)
    )
    return f"{question} -> {prediction or '(nothing)'}" + ("" if item.is_right else f"   (expected {expected})")


class Evaluator:
    """Evaluates parameters on up to `n` records, spread over a split; the same ones each time."""

    def __init__(
        self,
        model: MLMamba,
        tokenizer: Tokenizer,
        mesh: Mesh,
        stage: StageConfig,
        source: Sequence[Record],
        n: int,
        batch_size: int,
        max_new_tokens: int,
    ):
        self._model, self._tokenizer, self._mesh, self._batch_size = model, tokenizer, mesh, batch_size
        self._answers = {"batch_size": batch_size, "max_new_tokens": max_new_tokens, "form": stage.data.form}
        self._answers["skip"] = stage.data.max_bad > 0
        chosen = np.unique(np.linspace(0, len(source) - 1, min(n, len(source))).astype(int))
        self._records = [source[int(i)] for i in chosen]
        part, n = sharding.batch_part(mesh)
        whole = held_out_batches(self._records, tokenizer, model.config, stage)
        self._batches = [jax.tree.map(lambda a: np.split(a, n)[part], batch) for batch in whole]

        def losses(params: dict, batch: Batch):
            with sharding.split_kernels(mesh):
                return target_losses(model, params, batch)

        self._losses = jax.jit(losses, out_shardings=sharding.replicated(mesh))

    def __call__(self, params: dict, stop: Stop) -> Evaluation | None:
        """None if the run was asked to stop meanwhile."""
        total, count, answers = 0.0, 0.0, []
        for batch in self._batches:
            if stop.requested():
                return None
            loss, n = self._losses(params, sharding.place_batch(batch, self._mesh))
            total, count = total + float(loss), count + float(n)
        params, at_once = sharding.copy_to_each_process(params, self._mesh), self._batch_size * jax.process_count()
        for start in range(0, len(self._records), at_once):
            if stop.requested():
                return None
            part = self._records[start : start + at_once]
            answers += evals.answer_together(self._model, params, self._tokenizer, part, **self._answers)
        return Evaluation(total / count, answers)


def held_out_batches(
    records: Sequence[Record], tokenizer: Tokenizer, config: MLMambaConfig, stage: StageConfig
) -> list[Batch]:
    """Batches of the size of the stage's micro-batches; the last is filled with rows that have no target.

    Raises:
        InputError: a record that cannot be used; names it. With `max_bad` it is told of and left out, unless all are.
    """
    rows, length, data = stage.batch_size // stage.micro_batches, stage.data.max_tokens, stage.data
    samples = []
    for record in records:
        try:
            samples.append(make_sample(record, tokenizer, config, data.max_tokens, data.form))
        except InputError as error:
            if not data.max_bad or (record is records[-1] and not samples):
                raise
            print(f"skipped in evaluations: {error}", file=sys.stderr, flush=True)
    samples += [samples[-1]._replace(is_target=np.zeros_like(samples[-1].is_target))] * (-len(samples) % rows)
    parts = (samples[i : i + rows] for i in range(0, len(samples), rows))
    batches = [collate(part, config, pad_id=tokenizer.eos_id, length=length) for part in parts]
    if all(batch.image_mask is None for batch in batches):
        return batches
    everywhere = np.ones(rows, bool)  # one program for batches with and without
    return [b if b.image_mask is not None else b._replace(image_mask=everywhere) for b in batches]
