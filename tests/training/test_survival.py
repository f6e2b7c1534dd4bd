"""What happens to runs: started twice, other devices, a full disk, a dead worker, kill -9. None of it changes the numbers."""

import contextlib
import dataclasses
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest

import train
from ml_mamba_jax import checkpoint, serialize
from ml_mamba_jax.data.loader import BatchStream
from ml_mamba_jax.errors import CheckpointError, WorkerError
from ml_mamba_jax.training import loop
from ml_mamba_jax.training.metrics import read_metrics
from tests.training import short_run
from tests.training.test_stop import Interruption

STEPS = 10
N_RECORDS = 80
"""As many as ten batches of eight."""


def recipe(folder: Path, **changes):
    config = short_run.recipe(folder, STEPS, **changes)
    stage = config.stages[0]
    stage = dataclasses.replace(stage, data=dataclasses.replace(stage.data, train_scenes=N_RECORDS))
    return dataclasses.replace(config, stages=(stage,))


@pytest.fixture(scope="module", autouse=True)
def unevaluated():
    with mock.patch.object(train, "evaluate"):
        yield


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run of ten steps without incident; those that compare with it are compiled once."""
    config = recipe(tmp_path_factory.mktemp("straight"))
    with short_run.quickly():
        short_run.take(config)
        yield config


def test_the_same_command_gives_the_same_run(straight, tmp_path):
    for number in range(2):
        again = dataclasses.replace(straight, runs=tmp_path / str(number))
        short_run.take(again)
        short_run.assert_same_run(again, straight)


@pytest.mark.full
def test_the_same_command_gives_the_same_run_of_100_steps(tmp_path):
    """In processes of their own."""
    runs = [short_run.recipe(tmp_path, runs=tmp_path / str(number)) for number in range(3)]
    for run in runs:
        options = ["--steps=100", "--save-every=50", f"--runs={run.runs}"]
        subprocess.run(
            short_run.command(tmp_path, *options),
            check=True,
            stdout=subprocess.DEVNULL,
            timeout=600,
            env={**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false"},
        )
        assert len(short_run.losses(run)) == 100
        short_run.assert_same_run(run, runs[0])


@pytest.mark.parametrize(
    "error, call",
    [
        (OSError(28, "No space left on device"), 1),
        (PermissionError(13, "Permission denied"), 3),
        pytest.param(OSError(5, "Input/output error"), 2, marks=pytest.mark.full),
    ],
)
def test_a_checkpoint_that_cannot_be_written_ends_the_run_and_costs_nothing(
    straight, tmp_path, monkeypatch, error, call
):
    """`call`: the first or second of the small files of the second checkpoint, or its last step, the renaming."""
    config = dataclasses.replace(straight, runs=tmp_path)
    folder = config.runs / config.name
    calls, write_text = [], serialize.write_text

    def fails(path, text):
        calls.append(path)
        if len(calls) == call:
            raise error
        write_text(path, text)

    def save(*args):
        place, name = (serialize, "write_text") if call < 3 else (Path, "rename")
        failing = fails if call < 3 else mock.Mock(side_effect=error)
        with mock.patch.object(place, name, failing) if checkpoint.steps(folder) else mock.MagicMock():
            real(*args)

    real = loop.save_state
    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_state", save)
        with pytest.raises(CheckpointError, match=f"checkpoints/6: cannot be written: {error.strerror}; .* \\(3\\)"):
            short_run.take(config)
    assert checkpoint.steps(folder) == [3] and checkpoint.verify(folder, 3)
    assert not list((folder / "checkpoints").glob(".*")), "nothing is left in the room that is needed"
    assert len(read_metrics(folder / "metrics.jsonl")) == 6
    if call == 1:
        short_run.take(config)
        short_run.assert_same_run(config, straight)


FULL_DISK = """
import pathlib, resource, sys
import numpy as np
from ml_mamba_jax import checkpoint
from ml_mamba_jax.errors import CheckpointError
from tests import tiny_model

folder, count = pathlib.Path(sys.argv[1]), int(sys.argv[2])
items = {"params": tiny_model.params()}
checkpoint.save(folder, 5, items)
sizes = sorted(path.stat().st_size for path in (folder / "checkpoints").rglob("*") if path.is_file())
rng = np.random.default_rng(0)
for number in range(count):
    limit = int(rng.integers(sizes[-1] // 2)) if number % 2 else int(rng.integers(sizes[len(sizes) // 2]))
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        checkpoint.save(folder, 7 + number, items, keep=1)  # another step, for threads of the one that failed may still write
    except CheckpointError as error:
        said = str(error)
    else:
        said = ""
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert f"checkpoints/{7 + number}: cannot be written: " in said, f"{limit}: {said[-300:]}"
    assert checkpoint.steps(folder) == [5]
    checkpoint.verify(folder, 5)
checkpoint.save(folder, 999, items, keep=1)
assert checkpoint.steps(folder) == [999]
checkpoint.verify(folder, 999)
print("survived", count)
"""


@pytest.mark.parametrize("count", [4, pytest.param(100, marks=pytest.mark.full)])
def test_a_full_disk_never_takes_the_checkpoint_before(tmp_path, count):
    """Files may not grow beyond a random size, which orbax' threads meet as they would a full disk."""
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path), str(count)], capture_output=True, text=True, timeout=600
    )
    last = [line for line in done.stderr.splitlines() if line.startswith("AssertionError")]
    assert (done.returncode, done.stdout) == (0, f"survived {count}\n"), last


def test_the_log_says_where_it_cannot_write(straight, tmp_path, monkeypatch):
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("needs /dev/full")
    config = dataclasses.replace(straight, runs=tmp_path)
    (config.runs / config.name).mkdir(parents=True)
    with monkeypatch.context() as patch:
        patch.setattr(
            serialize.Path,
            "replace",
            lambda self, target: (
                target.symlink_to(full) if target.name == "metrics.jsonl" else os.replace(self, target)
            ),
        )
        with pytest.raises(OSError, match="No space left on device") as caught:
            short_run.take(config)
    assert caught.value.filename == str(config.runs / config.name / "metrics.jsonl")


def test_a_dead_data_worker_ends_the_run_within_ten_seconds(straight, tmp_path, monkeypatch):
    stage = straight.stages[0]
    stage = dataclasses.replace(stage, steps=10_000, data=dataclasses.replace(stage.data, workers=1))
    config = dataclasses.replace(straight, runs=tmp_path, stages=(stage,))
    killed, work_of = [], loop.work_of

    def kill(*args):
        if not killed:
            (worker,) = (process for process in multiprocessing.active_children() if "grain" in process.name)
            os.kill(worker.pid, signal.SIGKILL)
            killed.extend((worker.pid, time.perf_counter()))
        return work_of(*args)

    monkeypatch.setattr(loop, "work_of", kill)
    with pytest.raises(WorkerError) as caught:
        short_run.take(config)
    assert f"data: worker process {killed[0]} was killed by SIGKILL; resume the run" in str(caught.value)
    assert time.perf_counter() - killed[1] < 10


@pytest.mark.parametrize("devices", [(2, 1, 2), pytest.param((8, 4, 2, 1, 8), marks=pytest.mark.full)])
def test_a_run_goes_on_with_another_number_of_devices(tmp_path, monkeypatch, devices):
    """Two steps with each, the rest with the last. What is read is what was written; every record is learnt from once."""
    config = recipe(tmp_path, save_every=100)
    seen: list[str] = []
    digest, restore = BatchStream.digest, train.restore

    def recorded(stream):
        seen.extend(stream.ids)
        return digest.fget(stream)

    def compared(run, step):
        position, params, resumed = restore(run, step)
        assert run.mesh.size == n
        found = {"params": params, "optimizer": resumed.optimizer}
        saved = jax.tree.leaves(short_run.arrays(config, step))
        for one, other in zip(saved, jax.tree.leaves(found), strict=True):
            np.testing.assert_array_equal(one, np.asarray(other))
        return position, params, resumed

    monkeypatch.setattr(BatchStream, "digest", property(recorded))
    monkeypatch.setattr(train, "restore", compared)
    for i, n in enumerate(devices):
        with short_run.quickly(n), monkeypatch.context() as patch:
            if i < len(devices) - 1:
                Interruption(patch, loop, "work_of", signal.SIGTERM, 2)
            short_run.take(config)
        assert len(seen) == 8 * (2 * (i + 1) if i < len(devices) - 1 else STEPS)
    assert sorted(seen) == [f"train-{number:06d}" for number in range(N_RECORDS)]


class Victim:
    """A run in a process of its own, to be killed."""

    def __init__(self, folder: Path, options: list[str], environment: dict[str, str]):
        self.folder = folder / "killed" / short_run.NAME
        self.log = self.folder / "metrics.jsonl"
        self._old_log = self._started()
        self._left_over = self._partial()
        self.process = subprocess.Popen(
            short_run.command(folder, *options, f"--runs={self.folder.parent}", "--resume"),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment,
        )

    def wait_until(self, condition) -> None:
        deadline = time.monotonic() + 300
        while not condition():
            assert self.process.poll() is None, "ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.001)

    def n_steps(self) -> int:
        """0 until it has begun a log of its own, with what is left of the one before."""
        return self.log.read_bytes().count(b"\n") if self._started() != self._old_log else 0

    def _started(self) -> int | None:
        return self.log.stat().st_ino if self.log.is_file() else None

    def _partial(self) -> set[tuple[int, int]]:
        """Folders that are written or were left. The same name comes again, and so may the same inode."""
        found = set()
        for path in (self.folder / "checkpoints").glob(".*.partial"):
            with contextlib.suppress(FileNotFoundError):
                found.add((path.stat().st_ino, path.stat().st_ctime_ns))
        return found

    def is_saving(self) -> bool:
        return bool(self._partial() - self._left_over)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.mark.parametrize("count", [1, pytest.param(20, marks=pytest.mark.full)])
def test_killed_at_any_moment_it_goes_on_bit_by_bit(tmp_path, count):
    """A third of the kills inside of saves, a third after one to six steps, a third at any time until there are more steps."""
    rng = np.random.default_rng(count)
    environment = {**os.environ, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    options = [f"--steps={10 + 8 * count}", "--save-every=4"]
    began = time.monotonic()
    subprocess.run(short_run.command(tmp_path, *options), check=True, stdout=subprocess.DEVNULL, env=environment)
    seconds = time.monotonic() - began
    in_saves = 0
    for number in range(count):
        victim = Victim(tmp_path, options, environment)
        steps = checkpoint.steps(victim.folder)
        target = (steps[-1] if steps else 0) + int(rng.integers(1, 7))
        if number % 3 == 0:
            victim.wait_until(victim.is_saving)
            time.sleep(rng.uniform(0, 0.05))
            in_saves += victim.is_saving()
        elif number % 3 == 1:
            victim.wait_until(lambda victim=victim, target=target: victim.n_steps() >= target)
        else:
            end = time.monotonic() + rng.uniform(0, seconds)
            victim.wait_until(
                lambda victim=victim, target=target, end=end: time.monotonic() > end or victim.n_steps() >= target + 6
            )
        victim.kill()
        for step in checkpoint.steps(victim.folder):
            checkpoint.verify(victim.folder, step)
    victim = Victim(tmp_path, options, environment)
    assert victim.process.wait(timeout=600) == 0
    straight = short_run.recipe(tmp_path)
    short_run.assert_same_run(dataclasses.replace(straight, runs=tmp_path / "killed"), straight)
    print(f"{count} kills, {in_saves} of them while a checkpoint was written")
