"""No damage to a checkpoint goes unnoticed, and what it is in is named."""

import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from ml_mamba_jax import checkpoint, manifest
from ml_mamba_jax.errors import CheckpointError
from tests import tiny_model

STEPS = (5, 7)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Checkpoints of two steps."""
    folder = tmp_path_factory.mktemp("whole")
    for step in STEPS:
        items = {"params": tiny_model.params(), "optimizer": {"count": jnp.int32(step)}}
        checkpoint.save(folder, step, items, {"next_batch": step})
    return folder


def folder_of(path):
    """Of the newest step, that a file is in."""
    return next(folder for folder in path.parents if folder.name == str(STEPS[-1]))


def flip(rng, path, other):
    """A bit."""
    data = bytearray(path.read_bytes())
    data[rng.integers(len(data))] ^= 1 << rng.integers(8)
    path.write_bytes(data)


def truncate(rng, path, other):
    path.write_bytes(path.read_bytes()[: rng.integers(path.stat().st_size)])


def zero(rng, path, other):
    """A block of it."""
    data = bytearray(path.read_bytes())
    start = rng.integers(len(data))
    data[start : start + 4096] = bytes(len(data[start : start + 4096]))
    path.write_bytes(data)


def lengthen(rng, path, other):
    path.write_bytes(path.read_bytes() + bytes(rng.integers(1, 10)))


def remove(rng, path, other):
    path.unlink()


def add(rng, path, other):
    """Another file beside it."""
    shutil.copy(path, path.with_name(f"{path.name}-{rng.integers(100)}"))


def swap(rng, path, other):
    """With a file of the other step, or another file of its own where these are the same."""
    if not other.is_file() or other.read_bytes() == path.read_bytes():
        step_folder = folder_of(path)
        other = next(p for p in sorted(step_folder.rglob("*")) if p.is_file() and p.read_bytes() != path.read_bytes())
    mine, others = path.read_bytes(), other.read_bytes()
    path.write_bytes(others)
    other.write_bytes(mine)


def stand_in(rng, path, other):
    """The whole other step for this one."""
    step_folder = folder_of(path)
    shutil.rmtree(step_folder)
    shutil.copytree(step_folder.with_name(str(STEPS[0])), step_folder)


DAMAGES = (flip, truncate, zero, lengthen, remove, add, swap, stand_in)


@pytest.mark.parametrize("numbers", [range(100), pytest.param(range(100, 1100), marks=pytest.mark.full)])
def test_every_damage_is_found_and_named(whole, tmp_path, numbers):
    for number in numbers:
        rng, damage = np.random.default_rng(number), DAMAGES[number % len(DAMAGES)]
        folder = tmp_path / "damaged"
        shutil.copytree(whole, folder)
        newest = folder / "checkpoints" / str(STEPS[-1])
        files = sorted(path for path in newest.rglob("*") if path.is_file() and path.stat().st_size)
        path = files[rng.integers(len(files))]
        before = {p: p.read_bytes() for p in files}
        damage(rng, path, newest.with_name(str(STEPS[0])) / path.relative_to(newest))
        if damage is not add and all(p.is_file() and p.read_bytes() == data for p, data in before.items()):
            assert damage is zero, "only what is zero already is not damaged by that"
            checkpoint.verify(folder, STEPS[-1])
        else:
            with pytest.raises(CheckpointError, match=f"step {STEPS[-1]}: ") as caught:
                checkpoint.verify(folder, STEPS[-1])
            named = str(caught.value).split(": step")[0]
            assert named.startswith(str(newest)), (number, damage)
            is_manifest = path.name == manifest.MANIFEST_FILE  # which may then know a file by another name
            assert damage in (swap, stand_in, add) or is_manifest or named == str(path), (number, damage)
            assert "take another one (5, 7)" in str(caught.value)
        if damage is not swap:
            checkpoint.verify(folder, STEPS[0])
        shutil.rmtree(folder)


def test_parts_may_be_checked_alone(whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "damaged")
    (data,) = (folder / "checkpoints/7/params/d").iterdir()
    data.write_bytes(b"other")
    assert checkpoint.load_progress(folder, 7) == {"next_batch": 7}
    with pytest.raises(CheckpointError, match=f"{data}: step 7: the file differs from its SHA-256"):
        manifest.check(folder / "checkpoints" / "7", 7)
