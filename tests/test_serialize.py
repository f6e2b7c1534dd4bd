"""Configs through JSON and back, and what is refused."""

import dataclasses
import json

import pytest

from configs import PRESETS
from ml_mamba_jax import serialize
from ml_mamba_jax.config import NAMED, MLMambaConfig
from ml_mamba_jax.errors import InputError
from ml_mamba_jax.training.config import TrainConfig


@pytest.mark.parametrize("name", NAMED)
def test_models_survive(name):
    text = serialize.to_json(NAMED[name])
    json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))
    assert serialize.from_json(MLMambaConfig, text, "config") == NAMED[name]


@pytest.mark.parametrize("name", PRESETS)
def test_recipes_survive(name):
    assert serialize.from_json(TrainConfig, serialize.to_json(PRESETS[name]), "recipe") == PRESETS[name]


def edited(**changes) -> str:
    return json.dumps(json.loads(serialize.to_json(NAMED["tiny"])) | changes)


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "cannot be read as JSON"),
        ("[]", "expected the fields of MLMambaConfig"),
        ("{}", "config: got no language"),
        (edited(resise="letterbox"), "unknown field of config 'resise'; did you mean 'resize'"),
        (edited(resize="stretch"), r"config\.resize: got 'stretch', expected one of 'resize-naive'"),
        (edited(vision={}), r"config\.vision: got {}, expected a list"),
        (edited(language=3), r"config\.language: got 3"),
        (edited(connector=None), "got language and vision, expected all of language, vision and connector"),
    ],
)
def test_what_is_wrong_is_named(text, message):
    with pytest.raises(InputError, match=message):
        serialize.from_json(MLMambaConfig, text, "config")


def test_a_whole_number_stands_for_a_float_but_no_truth_for_a_number():
    mixer = NAMED["tiny"].language.mixer
    data = dataclasses.asdict(mixer) | {"norm_eps": 1, "dt_range": [0.1, 1]}
    data["dt_limit"], data["A_range"] = [0, "inf"], [1, 2]
    assert serialize.from_json(type(mixer), json.dumps(data), "mixer").norm_eps == 1.0
    with pytest.raises(InputError, match=r"mixer\.d_state: got True, expected int"):
        serialize.from_json(type(mixer), json.dumps(data | {"d_state": True}), "mixer")


def test_differences_name_the_fields():
    tiny = NAMED["tiny"]
    changed = dataclasses.replace(tiny, language=dataclasses.replace(tiny.language, n_layers=9), resize="letterbox")
    lines = serialize.differences(tiny, changed)
    assert lines == [f"language.n_layers: {tiny.language.n_layers} -> 9", "resize: resize-naive -> letterbox"]
    assert serialize.differences(tiny, tiny) == []


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "sub" / "a.txt"
    serialize.write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        serialize.write_text(path, "\ud800")
    assert path.read_text() == "old"
