"""A run goes on with the data and the tokenizer it was started with, or not at all."""

import dataclasses
import json
import shutil

import pytest

import train
from ml_mamba_jax import checkpoint
from ml_mamba_jax.data import prepare
from ml_mamba_jax.data.source import RecordSource
from ml_mamba_jax.errors import CheckpointError
from ml_mamba_jax.tokenizer import Tokenizer
from ml_mamba_jax.training.stop import Stopped
from tests.data.own_data import write_llava
from tests.training import short_run


@pytest.fixture
def start(monkeypatch):
    """A function that starts a run, or goes on with it, as far as a checkpoint after all its steps."""

    def only_save(run, log, number, params, resumed):
        checkpoint.save(run.folder, 8, {"params": params}, {"next_batch": 8})
        raise Stopped

    with short_run.quickly():
        monkeypatch.setattr(train, "take_stage", only_save)
        yield short_run.take


def with_data(config, **data):
    stage = dataclasses.replace(
        config.stages[0], data=dataclasses.replace(config.stages[0].data, digits=False, **data), batch_size=8
    )
    return dataclasses.replace(config, stages=(stage,))


def refused(config, name: str) -> str:
    """That the run is refused for `name`, with both values; returns these."""
    with pytest.raises(CheckpointError, match=r"inputs\.json: the run was started with other data") as caught:
        short_run.take(config)
    said = str(caught.value).split("(")[1].split(")")[0]
    assert said.startswith(f"{name}: ") and " -> " in said, said
    old, new = said.removeprefix(f"{name}: ").split(" -> ")
    assert old != new
    return said


def test_another_tokenizer_is_refused(tmp_path, start):
    config = short_run.recipe(tmp_path)
    start(config)
    Tokenizer.train(["something else"], 260).save(config.runs / config.name)
    assert "-> 260 entries " in refused(config, "tokenizer")
    (config.runs / config.name / "inputs.json").unlink()
    with pytest.raises(CheckpointError, match=r"inputs\.json: found no record of the data"):
        short_run.take(config)


def test_another_data_set_in_the_same_place_is_refused(tmp_path, start):
    json_file, images = write_llava(tmp_path, 12)
    prepared = tmp_path / "prepared"
    prepare.main([str(json_file), "--images", str(images), "--out", str(prepared), "--workers", "0"])
    config = with_data(short_run.recipe(tmp_path), prepared=prepared)
    start(config)
    before = RecordSource.open(prepared, "train").fingerprint()
    entries = json.loads(json_file.read_text())
    entries[5]["conversations"][1]["value"] = "It is 7."
    json_file.write_text(json.dumps(entries))
    shutil.move(prepared, tmp_path / "moved")
    prepare.main([str(json_file), "--images", str(images), "--out", str(prepared), "--workers", "0"])
    assert before in refused(config, "s.train")
    assert RecordSource.open(tmp_path / "moved", "train").fingerprint() == before, "wherever it lies"


def test_a_json_file_that_changed_is_refused(tmp_path, start):
    json_file, images = write_llava(tmp_path, 12)
    config = with_data(short_run.recipe(tmp_path), json_file=json_file, image_folder=images)
    start(config)
    text = json_file.read_text()
    json_file.write_text(text.replace("It is 9.", "It is 8."))
    assert refused(config, "s.train").count("12 records") == 2
    json_file.write_text(text)
    start(config)
