"""Evaluation during training, the best checkpoint, and the writers that hear of both."""

import dataclasses
import functools
import importlib.machinery
import importlib.util
import io
import json
import shutil
import struct
import sys
import types

import jax
import numpy as np
import pytest
from PIL import Image

import train
from configs import PRESETS
from ml_mamba_jax import checkpoint, sharding
from ml_mamba_jax.data.records import Record
from ml_mamba_jax.errors import InputError
from ml_mamba_jax.prompt import Turn
from ml_mamba_jax.tokenizer import Tokenizer
from ml_mamba_jax.training import loop, plots
from ml_mamba_jax.training.config import DataConfig, OptimConfig, StageConfig
from ml_mamba_jax.training.evals import Answer
from ml_mamba_jax.training.evaluation import Best, Evaluation, Evaluator, held_out_batches
from ml_mamba_jax.training.losses import target_losses
from ml_mamba_jax.training.stop import Stop
from ml_mamba_jax.training.watch import Watch
from ml_mamba_jax.training.writers import RunLog, check_installed
from tests import tiny_model
from tests.training.test_stages import SMALL

TINY = tiny_model.MODEL
STAGE = StageConfig("s", data=DataConfig(max_tokens=64), batch_size=8, micro_batches=2)


def png() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (40, 20), "red").save(stream, format="PNG")
    return stream.getvalue()


def record(i: int, image: bytes | None) -> Record:
    return Record(f"r{i}", image, (Turn("human", "Which?"), Turn("gpt", "7" * (i + 1))), "digit")


RECORDS = [record(i, png() if i % 3 else None) for i in range(6)]
TOKENIZER = Tokenizer.train([], 257)


def test_every_held_out_target_counts_once():
    batches = held_out_batches(RECORDS, TOKENIZER, TINY.config, STAGE)
    assert [batch.tokens.shape for batch in batches] == [(4, 64), (4, 64)]
    assert [int(batch.is_target.sum()) for batch in batches] == [2 + 3 + 4 + 5, 6 + 7]  # each answer and its end
    assert all(batch.image_mask is not None for batch in batches)
    pictures = held_out_batches([r for r in RECORDS if r.image], TOKENIZER, TINY.config, STAGE)
    assert [batch.image_mask for batch in pictures] == [None]


def test_bad_held_out_records_are_named_or_left_out(capsys):
    bad = [*RECORDS[:2], RECORDS[2]._replace(id="broken", image=b"no image")]
    with pytest.raises(InputError, match="broken: cannot decode the image"):
        held_out_batches(bad, TOKENIZER, TINY.config, STAGE)
    lenient = dataclasses.replace(STAGE, data=dataclasses.replace(STAGE.data, max_bad=0.5))
    (batch,) = held_out_batches(bad, TOKENIZER, TINY.config, lenient)
    assert int(batch.is_target.sum()) == 2 + 3
    assert capsys.readouterr().err.startswith("skipped in evaluations: broken: cannot decode")
    with pytest.raises(InputError, match="broken: cannot decode"):
        held_out_batches(bad[2:], TOKENIZER, TINY.config, lenient)


def test_the_held_out_loss_is_the_mean_over_targets_and_every_record_is_asked():
    mesh = sharding.make_mesh(2, 1, 1, devices=jax.devices()[:2])
    evaluator = Evaluator(TINY, TOKENIZER, mesh, STAGE, RECORDS, n=4, batch_size=4, max_new_tokens=16)
    found = evaluator(jax.device_put(tiny_model.params(), sharding.replicated(mesh)), Stop())
    chosen = [RECORDS[i] for i in (0, 1, 3, 5)]
    assert [item.record for item in found.answers] == chosen
    (batch,) = held_out_batches(chosen, TOKENIZER, TINY.config, STAGE)
    total, count = jax.jit(target_losses, static_argnums=0)(TINY, tiny_model.params(), batch)
    assert found.loss == pytest.approx(float(total / count), rel=1e-5)


def answers(right: int, of: int) -> list[Answer]:
    return [Answer(RECORDS[0], "7" if i < right else "no") for i in range(of)]


def test_the_best_has_more_right_answers_or_a_lower_loss():
    best = Best(step=1, accuracy=0.5, loss=1.0)
    assert best.is_beaten_by(Best(2, 0.6, 2.0)) and best.is_beaten_by(Best(2, 0.5, 0.9))
    assert not best.is_beaten_by(Best(2, 0.5, 1.0)) and not best.is_beaten_by(Best(2, 0.4, 0.1))


def test_samples_are_lines_with_what_was_expected():
    found = Evaluation(1.5, answers(1, 3), shown=2)
    assert found.samples() == "Which? -> 7\nWhich? -> no   (expected 7)"
    assert found.plain() == {"loss": 1.5, "accuracy": pytest.approx(1 / 3), "samples": found.samples().splitlines()}


def test_the_best_checkpoint_is_kept_and_known_after_a_restart(tmp_path, monkeypatch, capsys):
    """Evaluated every two of eight steps: right are 1, 3, 2 and 3 of 4, the last with a higher loss."""
    right = {2: (1, 1.0), 4: (3, 1.0), 6: (2, 0.5), 8: (3, 1.5)}
    calls = iter(())

    def evaluator(run, number):
        assert run.config.eval_every == 2
        return lambda params, stop: Evaluation(*(lambda n, loss: (loss, answers(n, 4)))(*right[next(calls)]))

    monkeypatch.setattr(sharding, "make_mesh", functools.partial(sharding.make_mesh, devices=jax.devices()[:1]))
    monkeypatch.setattr(loop, "_evaluator", evaluator)
    monkeypatch.setattr(train, "evaluate", lambda run, params: None)
    monkeypatch.setattr(plots, "loss_curve", lambda lines, path: None)
    recipe = PRESETS["digits-vqa"]
    data = dataclasses.replace(recipe.stages[0].data, folder=tmp_path / "data", train_scenes=32, test_scenes=1)
    stage = StageConfig("s", trains=("connector",), data=data, optim=OptimConfig(), steps=8, batch_size=8)
    config = dataclasses.replace(
        recipe, name="r", model=SMALL, stages=(stage,), save_every=5, keep=1, eval_every=2, runs=tmp_path / "runs"
    )
    calls = iter((2, 4, 6, 8))
    kept, save = [], checkpoint.save

    def saved(folder, step, *args, **kwargs):
        save(folder, step, *args, **kwargs)
        kept.append(checkpoint.steps(folder))
        if step == 5:
            shutil.copytree(folder, tmp_path / "resumed" / "r")

    monkeypatch.setattr(checkpoint, "save", saved)
    train.train(config, Stop(), Watch(60.0))
    assert kept == [[2], [4], [4, 5], [4, 8]], "of the newest one and the best; the one before went"
    shown = capsys.readouterr().out
    assert [shown.count(text) for text in ("the best so far", "held out", "75.0% of 4 right")] == [2, 4, 2]
    folder = tmp_path / "runs" / "r"
    assert checkpoint.load_progress(folder, 8)["best"] == {"step": 4, "accuracy": 0.75, "loss": 1.0}

    calls = iter((6, 8))
    train.train(dataclasses.replace(config, runs=tmp_path / "resumed", resume=True), Stop(), Watch(60.0))
    assert checkpoint.steps(tmp_path / "resumed" / "r") == [4, 8]
    assert "the best so far" not in capsys.readouterr().out
    assert (folder / "evals.jsonl").read_text() == (tmp_path / "resumed" / "r" / "evals.jsonl").read_text()
    lines = [json.loads(line) for line in (folder / "evals.jsonl").read_text().splitlines()]
    assert [(line["step"], line["accuracy"]) for line in lines] == [(2, 0.25), (4, 0.75), (6, 0.5), (8, 0.75)]


def events(folder) -> list:
    """What event files hold: records of length, checksum, event, checksum."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(folder.glob("*tfevents*")):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            found.append(Event.FromString(data[at + 12 : at + 12 + length]))
            at += 16 + length
    return found


def logged(tmp_path, *writers: str) -> None:
    config = dataclasses.replace(PRESETS["digits-vqa"], writers=writers, eval_every=1)
    log = RunLog(tmp_path, config, first_step=0)
    log.step(1, {"stage": "train", "loss": 2.5})
    log.evaluation(1, "train", Evaluation(1.5, answers(1, 2)))
    log.close()


def test_tensorboard_gets_numbers_and_answers(tmp_path):
    logged(tmp_path, "tensorboard")
    values = {
        value.tag: (event.step, value) for event in events(tmp_path / "tensorboard") for value in event.summary.value
    }
    assert {tag: (step, value.simple_value) for tag, (step, value) in values.items() if "answers" not in tag} == {
        "train/loss": (1, 2.5),
        "eval/loss": (1, 1.5),
        "eval/accuracy": (1, 0.5),
    }
    (texts,) = [value.tensor.string_val for tag, (_, value) in values.items() if tag.startswith("eval/answers")]
    assert b"Which? -> no   (expected 7)" in texts[0]
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "stage": "train", "loss": 2.5}


def test_a_resumed_run_takes_back_what_tensorboard_heard(tmp_path):
    logged(tmp_path, "tensorboard")
    config = dataclasses.replace(PRESETS["digits-vqa"], writers=("tensorboard",))
    RunLog(tmp_path, config, first_step=7).close()
    assert [e.step for e in events(tmp_path / "tensorboard") if e.session_log.status] == [8]


def test_wandb_gets_numbers_and_answers(tmp_path, monkeypatch):
    heard = []
    run = types.SimpleNamespace(
        log=lambda values, step: heard.append((step, values)), finish=lambda: heard.append("end")
    )
    fake = types.ModuleType("wandb")
    fake.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    fake.init, fake.Html = lambda **options: heard.append(options) or run, str
    monkeypatch.setitem(sys.modules, "wandb", fake)
    logged(tmp_path, "wandb")
    options, *steps, end = heard
    assert (options["name"], options["resume"]) == ("digits-vqa", None)
    first_id = options["id"]
    assert first_id.startswith(f"{tmp_path.name}-")
    assert options["config"]["stages"][0]["batch_size"] == 32
    assert steps[:2] == [(1, {"train/loss": 2.5}), (1, {"eval/loss": 1.5, "eval/accuracy": 0.5})] and end == "end"
    assert "Which? -> 7" in steps[2][1]["eval/answers"]
    config = dataclasses.replace(PRESETS["digits-vqa"], writers=("wandb",))
    for first_step, resume in ((7, "allow"), (0, None)):  # gone on with, and begun afresh
        RunLog(tmp_path, config, first_step).close()
        assert heard[-2]["resume"] == resume and (heard[-2]["id"] == first_id) == bool(first_step)


def test_a_writer_that_is_not_installed_is_refused(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"got wandb, but wandb is not installed; pip install '\.\[wandb\]'"):
        check_installed(("wandb",))
    check_installed(())


def test_evaluations_are_the_same_records_each_time():
    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    chosen = [
        Evaluator(TINY, TOKENIZER, mesh, STAGE, RECORDS, n=3, batch_size=4, max_new_tokens=16)._records
        for _ in range(2)
    ]
    assert chosen[0] == chosen[1] == [RECORDS[i] for i in (0, 2, 5)]
    assert np.unique([r.id for r in chosen[0]]).size == 3
