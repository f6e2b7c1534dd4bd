"""Where a run goes on: at its newest whole checkpoint, and only with the recipe it was started with."""

import dataclasses
import json

import jax.numpy as jnp
import pytest

from ml_mamba_jax import checkpoint
from ml_mamba_jax.errors import CheckpointError
from ml_mamba_jax.training.run_folder import find_start, write_recipe
from tests.training import short_run


@pytest.fixture
def config(tmp_path):
    """Of a run with checkpoints of three steps."""
    config = short_run.recipe(tmp_path, resume=True)
    folder = config.runs / config.name
    checkpoint.write_model(folder, config.model, None)
    write_recipe(folder, config)
    for step in (3, 6, 8):
        checkpoint.save(folder, step, {"params": {"a": jnp.ones(3)}}, keep=3)
    return config


def damage(config, *steps: int) -> None:
    for step in steps:
        (config.runs / config.name / "checkpoints" / str(step) / "params" / "_METADATA").write_text("{}")


def test_damaged_checkpoints_are_set_aside(config, capsys):
    folder = config.runs / config.name
    assert find_start(folder, config) == 8
    damage(config, 6, 8)
    assert find_start(folder, config) == 3
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(": step ")[0] for line in lines[:2]] == [
        str(folder / "checkpoints" / str(step) / "params" / "_METADATA") for step in (8, 6)
    ]
    assert lines[0].endswith(f"set aside as {folder / 'checkpoints' / '8.damaged'}")
    assert lines[2:] == ["going back to step 3, the newest checkpoint that is whole"]
    assert checkpoint.steps(folder) == [3]
    assert find_start(folder, config) == 3
    assert capsys.readouterr().err == ""


def test_strict_stops_at_a_damaged_checkpoint(config):
    damage(config, 8)
    folder = config.runs / config.name
    with pytest.raises(CheckpointError, match=r"checkpoints/8/params/_METADATA: step 8: the file differs"):
        find_start(folder, dataclasses.replace(config, strict=True))
    assert checkpoint.steps(folder) == [3, 6, 8]


def test_a_run_without_a_whole_checkpoint_is_not_started_afresh(config):
    damage(config, 3, 6, 8)
    folder = config.runs / config.name
    with pytest.raises(CheckpointError, match=r"none of 3 checkpoints is whole: .* step 8: .* step 6: .* step 3: "):
        find_start(folder, config)
    assert checkpoint.steps(folder) == [3, 6, 8]


def test_another_recipe_is_refused_with_both_values(config):
    folder = config.runs / config.name
    other = dataclasses.replace(config, seed=7, log_every=7)
    with pytest.raises(CheckpointError, match=r"another recipe \(seed: 0 -> 7\)"):
        find_start(folder, other)
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(written | {"prompt_format": "pure"}))
    with pytest.raises(CheckpointError, match=r"config\.json: .* \(prompt_format: pure -> zephyr\)"):
        find_start(folder, config)
