"""Two processes of four devices train as one process of eight does."""

import dataclasses
import functools
import json
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import train
from ml_mamba_jax import checkpoint
from ml_mamba_jax.training import loop
from ml_mamba_jax.training.config import MeshConfig
from ml_mamba_jax.training.metrics import read_metrics
from ml_mamba_jax.training.run_folder import load_reached
from ml_mamba_jax.training.stop import Stop
from ml_mamba_jax.training.watch import Watch
from tests.training.hosts import Hosts
from tests.training.hosts_run import Options, open_noted, recipe

PROGRAM = ["-m", "tests.training.hosts_run"]
CLOSE = 1e-6


def two(folder: Path, runs: str, *options: str) -> Hosts:
    places = [f"--folder={folder / 'data'}", f"--runs={folder / runs}"]
    return Hosts(folder / f"{runs}-output", [*PROGRAM, *places, *options], n=2, n_devices=4)


def one(folder: Path, runs: str, monkeypatch, **options) -> None:
    """The same run in this process, with its eight devices."""
    config = recipe(Options(folder / "data", folder / runs, **options))
    config.runs.mkdir()
    if not config.model.vision:
        monkeypatch.setattr(train, "evaluate", lambda run, params: None)
    with monkeypatch.context() as patch, Stop() as stop:
        patch.setattr(
            loop, "open_batches", functools.partial(open_noted, config.runs / "ids-0.jsonl", loop.open_batches)
        )
        train.train(config, stop, Watch(60.0))


def params(folder: Path) -> dict:
    return jax.tree.map(np.asarray, checkpoint.load_params(folder / "small"))


def assert_close(left: Path, right: Path) -> None:
    """Losses and what was counted of each step, and the parameters at the end."""
    ours, theirs = (read_metrics(folder / "small" / "metrics.jsonl") for folder in (left, right))
    assert [line["step"] for line in ours] == [line["step"] for line in theirs] == list(range(1, len(ours) + 1))
    for a, b in zip(ours, theirs, strict=True):
        assert [a[name] for name in ("tokens", "flops", "targets")] == [
            b[name] for name in ("tokens", "flops", "targets")
        ]
        np.testing.assert_allclose(a["loss"], b["loss"], rtol=CLOSE)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=CLOSE, atol=CLOSE), params(left), params(right))


def assert_each_record_is_read_once(two_processes: Path, one_process: Path) -> None:
    """In every batch process 0 reads the first half of the rows, process 1 the second, and nobody anything else."""
    first, second, whole = (
        [json.loads(line) for line in path.read_text().splitlines()]
        for path in (two_processes / "ids-0.jsonl", two_processes / "ids-1.jsonl", one_process / "ids-0.jsonl")
    )
    assert [a + b for a, b in zip(first, second, strict=True)] == whole
    assert all(not set(a) & set(b) for a, b in zip(first, second, strict=True))


def test_two_processes_train_as_one(tmp_path, monkeypatch):
    with two(tmp_path, "two", "--steps=8", "--save-every=4", "--no-sees", "--mesh.fsdp=8") as hosts:
        assert hosts.ends() == [0, 0], hosts.complained(1)
        assert "step 8/8" in hosts.said(0)
        assert hosts.said(1).replace("[Gloo]", "").count("\n") == hosts.said(1).count("[Gloo]"), "only process 0 speaks"
    one(tmp_path, "one", monkeypatch, steps=8, save_every=4, sees=False, mesh=MeshConfig(fsdp=8))
    assert_close(tmp_path / "two", tmp_path / "one")
    assert_each_record_is_read_once(tmp_path / "two", tmp_path / "one")
    assert checkpoint.steps(tmp_path / "two" / "small") == [4, 8]


@pytest.mark.full
@pytest.mark.parametrize("batching", ["random", "grouped", "packed"])
def test_over_fifty_steps(tmp_path, monkeypatch, batching):
    """All parts of the model, evaluations and answers; each process reads its records alone."""
    more = [f"--batching={batching}", "--eval-every=25", "--mesh.fsdp=2"]
    with two(tmp_path, "two", "--steps=50", *more) as hosts:
        assert hosts.ends() == [0, 0], hosts.complained(1)
    one(tmp_path, "one", monkeypatch, steps=50, batching=batching, eval_every=25, mesh=MeshConfig(fsdp=2))
    assert_close(tmp_path / "two", tmp_path / "one")
    assert_each_record_is_read_once(tmp_path / "two", tmp_path / "one")
    left, right = (read_metrics(tmp_path / runs / "small" / "evals.jsonl") for runs in ("two", "one"))
    assert [line["samples"] for line in left] == [line["samples"] for line in right]
    np.testing.assert_allclose([a["loss"] for a in left], [b["loss"] for b in right], rtol=CLOSE)
    assert (tmp_path / "two" / "small" / "eval.json").read_text() == (
        tmp_path / "one" / "small" / "eval.json"
    ).read_text()


@pytest.mark.full
def test_another_number_of_processes_goes_on(tmp_path, monkeypatch):
    """Two processes stop where they are asked to, one goes on, then two again: as one that was never stopped."""
    common = ["--steps=30", "--save-every=10"]
    log = tmp_path / "mixed" / "small" / "metrics.jsonl"
    with two(tmp_path, "mixed", *common) as hosts:
        hosts.wait_until(lambda: log.is_file() and log.read_bytes().count(b"\n") >= 3)
        hosts.processes[1].send_signal(signal.SIGTERM)
        assert hosts.ends() == [0, 0], hosts.complained(0)
        first = checkpoint.newest_step(tmp_path / "mixed" / "small")
        assert f"stopped after step {first}; go on with --resume" in hosts.said(0)
    assert load_reached(tmp_path / "mixed" / "small", first).next_batch == first < 30
    # One process goes on; it is stopped at its next checkpoint by being given no more steps.
    straight = recipe(Options(tmp_path / "data", tmp_path / "straight", steps=30, save_every=10))
    mixed = dataclasses.replace(straight, runs=tmp_path / "mixed")
    with Stop() as stop, monkeypatch.context() as patch:
        patch.setattr(stop, "requested", lambda: read_metrics(log)[-1]["step"] >= min(first + 5, 29))
        train.train(mixed, stop, Watch(60.0))
    second = checkpoint.newest_step(tmp_path / "mixed" / "small")
    assert first < second < 30
    with two(tmp_path, "mixed", *common) as hosts:
        assert hosts.ends() == [0, 0], hosts.complained(0)
        assert f"resumed after step {second}" in hosts.said(0)
    with Stop() as stop:
        train.train(straight, stop, Watch(60.0))
    assert_close(tmp_path / "mixed", tmp_path / "straight")


@pytest.mark.full
@pytest.mark.parametrize("sent", ["SIGKILL", "SIGSTOP"])
def test_training_ends_when_a_process_is_missing(tmp_path, sent):
    log = tmp_path / "two" / "small" / "metrics.jsonl"
    with two(tmp_path, "two", "--steps=100000", "--no-sees", "--hosts.peer-timeout=5") as hosts:
        hosts.wait_until(lambda: log.is_file() and log.read_bytes().count(b"\n") >= 3)
        hosts.processes[1].send_signal(getattr(signal, sent))
        began = time.monotonic()
        assert hosts.ends(0) == [5]
        assert time.monotonic() - began < 5 + 15
        assert hosts.error(0).startswith("error: process 1 is missing: ")
        assert "in take_stage" in hosts.complained(0)
