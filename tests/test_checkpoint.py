"""Checkpoints: bit-equal on any mesh, and no damage, mix-up or half-written step goes unnoticed."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ml_mamba_jax import checkpoint, serialize, sharding
from ml_mamba_jax.config import MLMambaConfig
from ml_mamba_jax.errors import CheckpointError
from ml_mamba_jax.tokenizer import Tokenizer
from tests import tiny_model

TINY = MLMambaConfig.named("tiny")


@pytest.fixture
def folder(tmp_path):
    """A run's folder with the checkpoints of two steps."""
    checkpoint.write_model(tmp_path, TINY, Tokenizer.train(["hello"], 300))
    for step in (5, 7):
        params = jax.tree.map(lambda a, step=step: a + step, tiny_model.params())
        checkpoint.save(tmp_path, step, {"params": params}, {"next_batch": step})
    return tmp_path


def assert_equal(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def step_files(folder, step=7):
    step_folder = folder / "checkpoints" / str(step)
    return sorted(path for path in step_folder.rglob("*") if path.is_file())


def test_what_is_loaded_is_what_was_saved(folder):
    loaded = checkpoint.load(folder)
    assert loaded.model.config == TINY
    assert loaded.tokenizer.encode("hello") == Tokenizer.train(["hello"], 300).encode("hello")
    assert type(loaded.params) is dict
    assert_equal(loaded.params, jax.tree.map(lambda a: a + 7, tiny_model.params()))
    assert_equal(checkpoint.load_params(folder, step=5), jax.tree.map(lambda a: a + 5, tiny_model.params()))
    assert checkpoint.load_progress(folder, 5) == {"next_batch": 5}


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (2, 2, 2)])
def test_parameters_are_restored_onto_any_mesh(folder, sizes):
    shardings = sharding.param_shardings(tiny_model.MODEL, sharding.make_mesh(*sizes))
    params = checkpoint.load_params(folder, shardings=shardings)
    assert_equal(params, jax.tree.map(lambda a: a + 7, tiny_model.params()))
    jax.tree.map(
        lambda a, s: pytest.fail(f"{a.sharding}, expected {s}") if a.sharding != s else None, params, shardings
    )


def test_only_the_newest_are_kept(folder):
    checkpoint.save(folder, 9, {"params": {"a": jnp.ones(3)}}, keep=2)
    assert checkpoint.steps(folder) == [7, 9]


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "manifest"])
def test_damage_is_found_and_named(folder, damage):
    for i, path in enumerate(step_files(folder)):
        if (path.name == "manifest.json") != (damage == "manifest"):
            continue
        whole = path.read_bytes()
        if damage in ("flip", "manifest"):
            position = len(whole) // 2
            path.write_bytes(whole[:position] + bytes([whole[position] ^ 0xFF]) + whole[position + 1 :])
        elif damage == "truncate":
            path.write_bytes(whole[: len(whole) // 2])
        else:
            path.unlink()
        with pytest.raises(CheckpointError, match="step 7") as caught:
            checkpoint.load_params(folder)
        assert str(path) in str(caught.value) or damage == "manifest"
        path.write_bytes(whole)
        if i > 8 and damage != "manifest":
            break
    assert checkpoint.load_params(folder, step=5)


def test_a_step_that_was_not_finished_does_not_exist(folder, monkeypatch):
    def killed(*args, **kwargs):
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(serialize, "write_text", killed)
        with pytest.raises(RuntimeError, match="killed"):
            checkpoint.save(folder, 9, {"params": tiny_model.params()})
    assert checkpoint.steps(folder) == [5, 7]
    assert checkpoint.newest_step(folder) == 7
    checkpoint.save(folder, 9, {"params": tiny_model.params()}, keep=9)
    assert checkpoint.steps(folder) == [5, 7, 9]
    assert not list((folder / "checkpoints").glob(".*")), "what the killed run left is gone"


def test_other_arrays_than_the_config_describes_are_all_listed(folder):
    target = {
        "params": {
            "language": {"norm": {"scale": jax.ShapeDtypeStruct((96,), jnp.bfloat16)}},
            "extra": jax.ShapeDtypeStruct((2,), jnp.float32),
        }
    }
    with pytest.raises(CheckpointError) as caught:
        checkpoint.restore(folder, 7, target)
    message = str(caught.value)
    assert "extra is missing" in message
    assert "is unexpected" in message
    with pytest.raises(CheckpointError, match="found no optimizer"):
        checkpoint.restore(folder, 7, {"optimizer": target["params"]})


def test_a_wrong_dtype_is_not_cast_silently(folder):
    params = tiny_model.params()
    target = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, jnp.bfloat16, sharding=a.sharding), params)
    with pytest.raises(CheckpointError, match=r"has float32\[.*expected bfloat16"):
        checkpoint.restore(folder, 7, {"params": target})


def test_folders_that_are_no_checkpoint_are_refused(folder, tmp_path):
    with pytest.raises(CheckpointError, match=r"found no config\.json"):
        checkpoint.load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="found no checkpoint of step 6, expected one of: 5, 7"):
        checkpoint.load_params(folder, step=6)
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"resize": "stretch"}))
    with pytest.raises(CheckpointError, match=r"config\.json.*got 'stretch'"):
        checkpoint.load(folder)
    checkpoint.write_model(tmp_path / "new", TINY, None)
    with pytest.raises(CheckpointError, match="new: found no checkpoint"):
        checkpoint.load(tmp_path / "new")
