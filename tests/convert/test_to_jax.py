"""PyTorch weights -> a folder: all that is wrong in one table, nothing half-written, and a folder that everything else takes."""

import gc
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict

from ml_mamba_jax import checkpoint, sharding
from ml_mamba_jax.config import VISION_ENCODERS, MLMambaConfig
from ml_mamba_jax.convert import import_torch
from ml_mamba_jax.convert.plan import Finding
from ml_mamba_jax.errors import CheckpointError, ConvertError, InputError
from ml_mamba_jax.generation import generate
from ml_mamba_jax.model import FLOAT32_PARAMS, MLMamba
from ml_mamba_jax.training.initial import start_from
from tests.convert.small_weights import (
    LANGUAGE,
    SMALL_ENCODERS,
    TINY,
    language,
    run,
    timm,
    write_foreign_tokenizer,
    write_hf_mamba2,
    write_mamba_ssm,
    write_run,
    write_timm,
    write_tokenizer,
)

ROOT = Path(__file__).parents[2]


def loaded(folder: Path, **options) -> dict[str, np.ndarray]:
    params = checkpoint.load_params(folder, **options)
    return {path: np.asarray(a) for path, a in flatten_dict(params, sep="/").items()}


def assert_same(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> None:
    assert left.keys() == right.keys()
    for path in left:
        assert left[path].dtype == right[path].dtype and left[path].tobytes() == right[path].tobytes(), path


@pytest.fixture(scope="module")
def ssm(tmp_path_factory) -> Path:
    """A language model of state-spaces/mamba with a tokenizer beside it."""
    folder = write_mamba_ssm(tmp_path_factory.mktemp("src") / "ssm")
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def converted(ssm, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("out") / "converted"
    import_torch(ssm, out)
    return out


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory) -> Path:
    """A run of ML-Mamba with its encoders."""
    return write_run(tmp_path_factory.mktemp("src") / "run")


# Everything that is wrong, at once


def spoilt() -> dict[str, torch.Tensor]:
    """A language model with one of each mistake, and 260 rows of 272 in its embedding, which is none."""
    tensors = language(rows=260)
    layer = "backbone.layers.{}.".format
    del tensors[f"{layer(0)}mixer.D"]
    tensors["backbone.layers.0.mixer.extra"] = torch.ones(3)
    tensors[f"{layer(0)}mixer.norm.weight"] = torch.ones(63)
    tensors[f"{layer(1)}mixer.out_proj.weight"] = tensors[f"{layer(1)}mixer.out_proj.weight"].T.contiguous()
    tensors[f"{layer(1)}norm.weight"] = torch.ones(32, dtype=torch.int64)
    tensors[f"{layer(1)}mixer.dt_bias"] = torch.tensor([1, 2, 3, float("nan")])
    tensors[f"{layer(2)}norm.weight"] = torch.full((32,), 1e6)  # beyond float16
    tensors[f"{layer(2)}mixer.A_log"] = torch.full((4,), 1e6)  # which stays float32
    tensors["lm_head.weight"] = tensors["backbone.embedding.weight"] + 1
    return tensors


EXPECTED = [
    ("missing", "backbone.layers.0.mixer.D", "expected for language/blocks/mixer/D[0]"),
    ("unexpected", "backbone.layers.0.mixer.extra", "no parameter here takes it"),
    (
        "shape",
        "backbone.layers.0.mixer.norm.weight",
        "got [63], expected [64] for language/blocks/mixer/norm_weight[0]",
    ),
    (
        "shape",
        "backbone.layers.1.mixer.out_proj.weight",
        "got [64, 32], expected [32, 64] for language/blocks/mixer/out_proj/kernel[1]: it is transposed",
    ),
    ("dtype", "backbone.layers.1.norm.weight", "got int64, expected floating point"),
    ("not finite", "backbone.layers.1.mixer.dt_bias", "NaN or infinity as float32"),
    ("not finite", "backbone.layers.2.norm.weight", "NaN or infinity as float16"),
    ("tied", "lm_head.weight", "differs from language/embedding[0:260], expected equal numbers"),
]


def test_all_that_is_wrong_stands_in_one_table(tmp_path):
    src = write_mamba_ssm(tmp_path / "src", spoilt())
    with pytest.raises(ConvertError) as caught:
        import_torch(src, tmp_path / "out", dtype="float16")
    first, *rows = str(caught.value).splitlines()
    assert first == f"{src}: {len(EXPECTED)} problems, nothing was written"
    problems = [row for row in rows if row.startswith("problem")]
    assert len(problems) == len(EXPECTED)
    for what, key, detail in EXPECTED:
        assert any(row.split()[1:3] == [*what.split(), key][:2] and key in row and detail in row for row in problems), (
            what
        )
    assert any("padded" in row and "rows 260 to 271 are zeros" in row for row in rows), "what is no problem is told too"
    assert os.listdir(tmp_path) == ["src"]


def test_the_same_mistake_in_several_layers_is_one_line_that_names_them(tmp_path):
    tensors = language()
    for layer in (0, 2):
        tensors[f"backbone.layers.{layer}.norm.weight"] = torch.full((32,), float("inf"))
    with pytest.raises(ConvertError) as caught:
        import_torch(write_mamba_ssm(tmp_path / "src", tensors), tmp_path / "out")
    (row,) = [row for row in str(caught.value).splitlines() if row.startswith("problem")]
    assert "backbone.layers.{i}.norm.weight" in row and row.endswith("x 2: layers 0, 2")


def test_a_missing_embedding_does_not_hide_the_rest(tmp_path):
    tensors = language()
    del tensors["backbone.layers.0.mixer.D"]
    tensors["lm_head.weight"] = tensors["lm_head.weight"].clone()
    tensors["backbone.embedding.weight"] = torch.ones(3, 4, dtype=torch.int32)
    with pytest.raises(ConvertError, match=r"2 problems") as caught:
        import_torch(write_mamba_ssm(tmp_path / "src", tensors), tmp_path / "out")
    assert "got int32" in str(caught.value) and "mixer.D " in str(caught.value)


def test_a_dry_run_shows_the_plan_behind_the_problems(tmp_path):
    src = write_mamba_ssm(tmp_path / "src", spoilt())
    with pytest.raises(
        ConvertError, match=r"(?s)7 problems.*backbone\.layers\.\{i\}\.mixer\.in_proj\.weight .*transposed"
    ):
        import_torch(src, None, dry_run=True)


# Findings that are none of these


def findings(src: Path, **options) -> dict[str, list[Finding]]:
    by_what: dict[str, list[Finding]] = {}
    for finding in import_torch(src, None, dry_run=True, **options).findings:
        assert not finding.is_problem
        by_what.setdefault(finding.what, []).append(finding)
    return by_what


def test_findings_of_a_language_model(ssm, tmp_path):
    assert findings(ssm) == {"tied": [Finding("tied", "lm_head.weight", "must equal language/embedding", False)]}
    assert findings(write_hf_mamba2(tmp_path / "hf")) == {}
    untied = {"tie_word_embeddings": False, "vocab_size": 272}
    tensors = {key.replace("embedding.", "embeddings."): t.clone() for key, t in language().items()}
    assert findings(write_hf_mamba2(tmp_path / "untied", tensors=tensors, **untied)) == {}


def test_rows_of_the_vocabulary_that_are_not_there_are_zeros(tmp_path):
    tensors = language(rows=264)
    out = tmp_path / "out"
    src = write_mamba_ssm(tmp_path / "src", tensors)
    assert findings(src)["padded"] == [
        Finding("padded", key, "rows 264 to 271 are zeros", False)
        for key in ("backbone.embedding.weight", "lm_head.weight")
    ]
    import_torch(src, out)
    embedding = loaded(out)["language/embedding"]
    assert embedding.shape == (272, 32) and not embedding[264:].any()
    np.testing.assert_array_equal(embedding[:264], tensors["backbone.embedding.weight"].numpy())


@pytest.mark.parametrize("rows", [259, 273])
def test_other_numbers_of_rows_are_refused(tmp_path, rows):
    with pytest.raises(ConvertError, match=rf"got \[{rows}, 32\], expected \[272, 32\]"):
        import_torch(write_mamba_ssm(tmp_path / "src", language(rows=rows)), tmp_path / "out")


def test_a_vit_of_timm_is_what_its_config_says(tmp_path, monkeypatch):
    """Encoders of one structure differ in their activation and in the statistics of their images."""
    encoder = SMALL_ENCODERS["clip-vit-b"]
    monkeypatch.setitem(VISION_ENCODERS, "clip-vit-b", encoder)
    src = write_timm(tmp_path / "vit", encoder)
    (src / "config.json").unlink()
    (assumed,) = findings(src)["assumed"]
    assert "activation quick_gelu" in assumed.detail and str(encoder.mean) in assumed.detail

    def converted_with(name: str, **fields):
        (src / "config.json").write_text(json.dumps(fields))
        import_torch(src, tmp_path / name)
        assert "assumed" not in findings(src)
        return checkpoint.load_config(tmp_path / name).vision[0]

    laion = {"tag": "laion2b", "mean": [0.5, 0.25, 0.75], "std": [0.5, 0.5, 0.25]}
    found = converted_with("laion", architecture="vit_base_patch16_clip_224", pretrained_cfg=laion)
    assert (found.activation, found.mean, found.std) == ("gelu", (0.5, 0.25, 0.75), (0.5, 0.5, 0.25))
    assert converted_with("new", architecture="vit_base_patch16_clip_quickgelu_224") == encoder
    assert converted_with("old", architecture="vit_base_patch16_clip_224", pretrained_cfg={"tag": "openai"}) == encoder
    with pytest.raises(ConvertError, match=r"config\.json: pretrained_cfg\.mean: got \[1\], expected three numbers"):
        converted_with("wrong", architecture="vit", pretrained_cfg={"mean": [1]})


def test_what_the_model_does_not_run_is_listed(tmp_path):
    encoder = SMALL_ENCODERS["dinov2-vit-l"]
    found = findings(write_timm(tmp_path / "vit", encoder))
    unused = {key for key in timm(encoder) if key.startswith(("blocks.2.", "norm.", "head.", "mask_token"))}
    assert found.keys() == {"not needed"} and {finding.key for finding in found["not needed"]} == unused
    assert len(unused) == 14 + 2 + 2 + 1


@pytest.mark.parametrize("name", ["dinov2-vit-l", "clip-vit-b"])
def test_positions_of_another_grid_are_resampled(tmp_path, name):
    encoder = SMALL_ENCODERS[name]
    src = write_timm(tmp_path / "vit", encoder, timm(encoder, side=6))
    (finding,) = findings(src)["resampled"]
    assert (finding.key, finding.detail) == ("pos_embed", "positions 6 x 6 -> 4 x 4")
    import_torch(src, tmp_path / "out")
    params, positions = loaded(tmp_path / "out"), timm(encoder, side=6)["pos_embed"][0]
    if encoder.class_position:
        np.testing.assert_array_equal(params["vision/clip/class_pos_embed"], positions[:1].numpy())
        positions = positions[1:]
    square = positions.reshape(1, 6, 6, -1).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(square, size=(4, 4), mode="bicubic", antialias=True)
    expected = expected.permute(0, 2, 3, 1).reshape(16, -1).numpy()
    np.testing.assert_allclose(params[f"vision/{encoder.name}/pos_embed"], expected, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 15, 24), (2, 36, 24), (1, 36, 23), (36, 24)])
def test_positions_of_no_grid_are_refused(tmp_path, shape):
    encoder = SMALL_ENCODERS["siglip-vit-so400m"]
    src = write_timm(tmp_path / "vit", encoder, timm(encoder) | {"pos_embed": torch.ones(shape)})
    with pytest.raises(ConvertError, match=r"pos_embed +got \[.*\], expected \[1, 16, 24\]"):
        import_torch(src, tmp_path / "out")


# The folder


def test_every_number_is_where_the_table_says(converted):
    tensors, params = language(), loaded(converted)
    np.testing.assert_array_equal(params["language/embedding"], tensors["backbone.embedding.weight"].numpy())
    for i in range(LANGUAGE.n_layers):
        key, path = f"backbone.layers.{i}.mixer.", "language/blocks/mixer/"
        np.testing.assert_array_equal(params[f"{path}in_proj/kernel"][i].T, tensors[f"{key}in_proj.weight"].numpy())
        np.testing.assert_array_equal(params[f"{path}out_proj/kernel"][i].T, tensors[f"{key}out_proj.weight"].numpy())
        np.testing.assert_array_equal(params[f"{path}conv_weight"][i], tensors[f"{key}conv1d.weight"][:, 0].numpy())
        np.testing.assert_array_equal(params[f"{path}A_log"][i], tensors[f"{key}A_log"].numpy())


def test_the_folder_generates_text(converted):
    model, params, tokenizer = checkpoint.load(converted)
    assert model.config == MLMambaConfig(language=LANGUAGE) and tokenizer is not None
    first = generate(model, params, tokenizer, ["what?"], max_new_tokens=4)
    assert first == generate(model, params, tokenizer, ["what?"], max_new_tokens=4) and isinstance(first[0], str)
    assert sorted(os.listdir(converted)) == ["checkpoints", "config.json", "conversion.json", "tokenizer.json"]
    assert checkpoint.steps(converted) == [0]


def test_training_starts_from_the_folder(converted):
    """On a mesh, and as the language part of a larger model."""
    model = MLMamba(MLMambaConfig(language=LANGUAGE))
    place = sharding.param_shardings(model, sharding.make_mesh(2, 2, 2))
    params = checkpoint.load_params(converted, shardings=place)
    assert_same({p: np.asarray(a) for p, a in flatten_dict(params, sep="/").items()}, loaded(converted))
    assert jax.tree.all(jax.tree.map(lambda a, s: a.sharding == s, params, place))
    other = model.init(jax.random.key(0), **model.dummy_inputs())["params"]
    started, lines = start_from([converted], model.config, other)
    assert lines == [f"language from {converted}"]
    assert_same({p: np.asarray(a) for p, a in flatten_dict(started, sep="/").items()}, loaded(converted))


def test_the_record_of_a_conversion(ssm, converted):
    record = json.loads((converted / "conversion.json").read_text())
    digest = hashlib.sha256((ssm / "pytorch_model.bin").read_bytes()).hexdigest()
    config = hashlib.sha256((ssm / "config.json").read_bytes()).hexdigest()
    expected = {"pytorch_model.bin": digest, "config.json": config}
    if (ssm / "tokenizer.json").is_file():
        expected["tokenizer.json"] = hashlib.sha256((ssm / "tokenizer.json").read_bytes()).hexdigest()
    assert record["files"] == expected
    assert (record["kind"], record["source"], record["param_dtype"]) == ("mamba2", "ssm", "float32")
    assert record["missing_encoders"] == []
    tensors = {tensor["key"]: tensor for tensor in record["tensors"]}
    assert tensors.keys() == language().keys() and len(tensors) == len(record["tensors"])
    assert tensors["backbone.layers.1.mixer.conv1d.weight"] == {
        "key": "backbone.layers.1.mixer.conv1d.weight",
        "file": "pytorch_model.bin",
        "shape": [80, 1, 4],
        "dtype": "float32",
        "transform": "depthwise",
        "parameter": "language/blocks/mixer/conv_weight[1]",
    }
    assert tensors["lm_head.weight"]["transform"] == "tied"
    assert [finding["what"] for finding in record["findings"]] == ["tied"]


def test_the_record_of_a_run_has_every_file(whole_run, tmp_path):
    """Encoders have files of the same name in different folders."""
    import_torch(whole_run, tmp_path / "out")
    record = json.loads((tmp_path / "out" / "conversion.json").read_text())
    expected = [
        "checkpoints/latest-checkpoint.pt",
        "vision/dinov2/model.safetensors",
        "vision/siglip/model.safetensors",
    ]
    read = [*expected, "config.json", "vision/dinov2/config.json", "vision/siglip/config.json"]
    assert record["files"] == {name: hashlib.sha256((whole_run / name).read_bytes()).hexdigest() for name in read}
    assert {tensor["file"] for tensor in record["tensors"]} == set(expected)
    keys = {tensor["key"] for tensor in record["tensors"]}
    assert "siglip:blocks.0.attn.qkv.weight" in keys and "model/llm_backbone/lm_head.weight" in keys
    model, params, tokenizer = checkpoint.load(tmp_path / "out")
    assert model.config == TINY and tokenizer is None
    content = run(TINY)["model"]
    np.testing.assert_array_equal(
        params["connector"]["blocks"]["mixer"]["conv_weight"][1, 1],
        content["bidirectional_mamba"]["layers.1.mixer.conv1d_b.weight"][:, 0].numpy(),
    )


@pytest.fixture(scope="module")
def run_model(converted):
    """Parameters -> logits of forty tokens."""
    model = checkpoint.load(converted).model
    jitted = jax.jit(lambda params: model.apply({"params": params}, jnp.arange(40)[None]))
    return lambda folder: np.asarray(jitted(checkpoint.load_params(folder)), np.float32)


@pytest.fixture(scope="module")
def exact_logits(run_model, converted):
    return run_model(converted)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_parameters_in_half_precision(ssm, converted, run_model, exact_logits, tmp_path, dtype):
    out = tmp_path / "out"
    import_torch(ssm, out, dtype=dtype)
    assert json.loads((out / "config.json").read_text())["param_dtype"] == dtype
    params, exact = loaded(out), loaded(converted)
    for path, array in params.items():
        kept = path.split("/")[-1] in FLOAT32_PARAMS
        assert array.dtype == (np.float32 if kept else np.dtype(getattr(ml_dtypes, dtype, dtype))), path
        np.testing.assert_array_equal(array, exact[path].astype(array.dtype))
    theirs, ours = exact_logits, run_model(out)
    assert np.abs(theirs - ours).max() < {"bfloat16": 0.05, "float16": 0.01}[dtype] * np.abs(theirs).max()
    assert np.abs(theirs - ours).max() > 0


def test_a_run_without_its_encoders(tmp_path):
    src = write_run(tmp_path / "run", encoders=False)
    out = tmp_path / "out"
    conversion = import_torch(src, out)
    assert all(finding.what == "tied" for finding in conversion.findings)
    message = r"out: holds no parameters of the image encoders dinov2, siglip; convert again with their weights"
    for load in (checkpoint.load_params, checkpoint.load):
        with pytest.raises(CheckpointError, match=message):
            load(out)
    params = loaded(out, without_encoders=True)
    assert {path.split("/")[0] for path in params} == {"language", "connector"}
    with_one = tmp_path / "with-one"
    import_torch(src, with_one, vision=[write_timm(tmp_path / "siglip", TINY.vision[1])])
    with pytest.raises(CheckpointError, match=r"holds no parameters of the image encoders dinov2;"):
        checkpoint.load_params(with_one)
    found = loaded(with_one, without_encoders=True)
    assert {path.split("/")[1] for path in found if path.startswith("vision/")} == {"siglip"}


def test_the_checkpoint_of_a_run_is_as_good_as_its_folder(whole_run, tmp_path):
    import_torch(whole_run, tmp_path / "folder")
    import_torch(whole_run / "checkpoints" / "latest-checkpoint.pt", tmp_path / "file")
    assert_same(loaded(tmp_path / "folder"), loaded(tmp_path / "file"))


def test_encoders_in_any_order_and_from_anywhere(whole_run, tmp_path):
    src = write_run(tmp_path / "run", encoders=False)
    vision = [whole_run / "vision" / name for name in ("siglip", "dinov2")]
    import_torch(src, tmp_path / "out", vision=vision)
    import_torch(whole_run, tmp_path / "beside")
    assert_same(loaded(tmp_path / "out"), loaded(tmp_path / "beside"))
    record = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert str(vision[0] / "model.safetensors") in record["files"]


def test_encoders_that_do_not_belong_to_a_run(whole_run, ssm, tmp_path):
    siglip = whole_run / "vision" / "siglip"
    clip = write_timm(tmp_path / "clip", SMALL_ENCODERS["clip-vit-b"])
    for vision, message in (
        ([clip], "clip: got a clip encoder, expected one of the run's: dinov2, siglip"),
        ([siglip, siglip], "siglip: got a second siglip encoder, expected one"),
        ([ssm], "ssm: got a mamba2, expected the weights of an image encoder"),
        ([tmp_path / "nowhere"], "nowhere: found no such file"),
    ):
        with pytest.raises(ConvertError, match=message):
            import_torch(whole_run, tmp_path / "out", vision=vision)
    with pytest.raises(ConvertError, match="got vision weights for a mamba2, expected them for a run of ML-Mamba only"):
        import_torch(ssm, tmp_path / "out", vision=[siglip])
    with pytest.raises(ConvertError, match="got encoder dinov2-vit-l for a mamba2, expected it for an encoder alone"):
        import_torch(ssm, tmp_path / "out", encoder="dinov2-vit-l")
    with pytest.raises(InputError, match="unknown encoder 'dino-vit-l'; did you mean 'dinov2-vit-l'"):
        import_torch(siglip, tmp_path / "out", encoder="dino-vit-l")
    assert not (tmp_path / "out").exists()


# Tokenizers


def test_a_tokenizer_that_is_given(ssm, converted, tmp_path):
    src = write_hf_mamba2(tmp_path / "hf")
    for i, given in enumerate((ssm / "tokenizer.json", ssm)):
        import_torch(src, tmp_path / f"out{i}", tokenizer=given)
        mine, theirs = (checkpoint.load(folder).tokenizer for folder in (tmp_path / f"out{i}", converted))
        assert mine.encode("what?") == theirs.encode("what?")
    assert checkpoint.load(import_and_return(src, tmp_path / "without")).tokenizer is None


def import_and_return(src: Path, out: Path) -> Path:
    import_torch(src, out)
    return out


def test_a_tokenizer_of_another_model_is_left_out_with_a_note(tmp_path):
    src = write_hf_mamba2(tmp_path / "hf")
    write_foreign_tokenizer(src)
    (note,) = findings(src)["tokenizer"]
    assert note.key == "tokenizer.json" and "left out: got a vocabulary without <|endoftext|>" in note.detail
    assert checkpoint.load(import_and_return(src, tmp_path / "out")).tokenizer is None
    (src / "tokenizer.json").write_text("{")
    assert "left out: cannot read" in findings(src)["tokenizer"][0].detail
    tensors = language(embedding="embeddings", rows=250)
    del tensors["lm_head.weight"]
    small = write_hf_mamba2(tmp_path / "small", tensors=tensors, vocab_size=250)
    write_tokenizer(small)
    (note,) = findings(small)["tokenizer"]
    assert "left out: got 260 entries, expected at most one for each of the 250 embeddings" in note.detail


def test_a_tokenizer_that_is_given_must_fit(ssm, tmp_path):
    foreign = write_foreign_tokenizer(tmp_path / "foreign")
    with pytest.raises(
        ConvertError, match=r"tokenizer\.json: cannot be the tokenizer of these weights: got a vocabulary"
    ):
        import_torch(ssm, tmp_path / "out", tokenizer=foreign)
    with pytest.raises(ConvertError, match=r"nowhere: found no such tokenizer, expected a tokenizer\.json"):
        import_torch(ssm, tmp_path / "out", tokenizer=tmp_path / "nowhere")
    encoder = write_timm(tmp_path / "vit", SMALL_ENCODERS["clip-vit-b"])
    with pytest.raises(ConvertError, match="got a tokenizer for a timm-vit, expected it for a language model only"):
        import_torch(encoder, tmp_path / "out", tokenizer=ssm)
    write_tokenizer(encoder)  # of a text tower
    assert "tokenizer" not in findings(encoder)
    import_torch(encoder, tmp_path / "out")
    assert not (tmp_path / "out" / "tokenizer.json").exists()


# Nothing half-written


@pytest.mark.parametrize("what", ["folder", "file", "link"])
def test_an_output_that_exists_is_left_alone(ssm, tmp_path, what):
    out = tmp_path / "out"
    if what == "folder":
        out.mkdir()
        (out / "mine.txt").write_text("mine")
    elif what == "file":
        out.write_text("mine")
    else:
        out.symlink_to("nowhere")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match="out: exists already; name another folder or remove it"):
        import_torch(ssm, out)
    assert sorted(tmp_path.rglob("*")) == before
    if what == "folder":
        assert (out / "mine.txt").read_text() == "mine"


def test_a_place_that_cannot_be_written_is_told_before_anything_is_read(ssm, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("ml_mamba_jax.convert.conversion.open_source", lambda *a, **k: pytest.fail("was read"))
    with pytest.raises(
        InputError, match=r"deep/out: cannot be written: .*file is no folder that you may write to"
    ) as caught:
        import_torch(ssm, tmp_path / "file" / "deep" / "out")
    assert "\n" not in str(caught.value)


def test_a_folder_is_made_with_its_parents(ssm, tmp_path):
    import_torch(ssm, tmp_path / "a" / "b" / "out")
    assert os.listdir(tmp_path / "a" / "b") == ["out"]


def test_too_little_room_is_told_before_anything_is_read(ssm, tmp_path, monkeypatch):
    def usage(folder):
        assert folder == tmp_path
        return shutil._ntuple_diskusage(10**12, 10**12 - 100_000, 100_000)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    with pytest.raises(
        InputError, match=r"deep/out: needs 0\.12 MB, but 0\.10 MB are free; make room or choose another"
    ) as caught:
        import_torch(ssm, tmp_path / "deep" / "out")
    assert "\n" not in str(caught.value) and os.listdir(tmp_path) == []
    assert import_torch(ssm, None, dry_run=True).report


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # orbax forgets its own coroutines
@pytest.mark.parametrize("limit", [100, 20_000])
def test_a_full_disk_is_one_line_and_leaves_nothing(ssm, tmp_path, limit):
    """A limit for the size of a file, which a write meets as it meets the end of a disk."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(InputError, match=r"out: cannot be written: .*File too large") as caught:
            import_torch(ssm, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    gc.collect()
    assert "\n" not in str(caught.value) and os.listdir(tmp_path) == []


KILLED = """
import os, signal, sys
from ml_mamba_jax.convert import import_torch

count, kill_at, out = 0, 0, ""

def watch(event, arguments):
    global count
    if event in ("open", "os.mkdir", "os.rename", "os.rmdir", "shutil.rmtree", "os.remove") and out in str(arguments[0]):
        count += 1
        if count == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(watch)

def convert_in_a_child(name, at):
    global count, out, kill_at
    child = os.fork()
    if not child:
        count, out, kill_at = 0, name, at
        import_torch(sys.argv[1], os.path.join(sys.argv[2], name))
        with open(sys.argv[3], "w") as file:
            file.write(str(count))
        os._exit(0)
    return os.waitpid(child, 0)[1]

assert convert_in_a_child("whole", 0) == 0
with open(sys.argv[3]) as file:
    total = int(file.read())
n_points = int(sys.argv[4])
points = [1 + i * (total - 1) // (n_points - 1) for i in range(n_points)]
print(total, *(convert_in_a_child(f"point{i}", at) for i, at in enumerate(points)))
"""
"""Conversions that are killed at the n-th time that they open, make, rename or remove something in their output."""


def test_killed_at_any_point_the_output_is_absent_or_complete(ssm, converted, tmp_path):
    arguments = [str(ssm), str(tmp_path), str(tmp_path / "count"), "8"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, "-c", KILLED, *arguments], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    total, *statuses = map(int, done.stdout.split())
    # How often orbax touches a file is not always the same, so the last one may come through.
    assert total > 30 and len(statuses) == 8 and statuses[:-1] == [signal.SIGKILL] * 7
    expected, left_over = loaded(converted), 0
    for name in ["whole", *(f"point{i}" for i in range(8))]:
        out, partial = tmp_path / name, tmp_path / f".{name}.partial"
        left_over += partial.exists()
        if name == "whole":
            assert out.exists()
        if not out.exists():
            import_torch(ssm, out)
        assert_same(loaded(out), expected)
        assert not partial.exists(), "what the killed conversion left is gone"
        assert (out / "conversion.json").read_bytes() == (converted / "conversion.json").read_bytes()
    assert left_over >= 5, "they were killed in the middle"


def test_findings_are_those_that_are_documented():
    folder = ROOT / "ml_mamba_jax" / "convert"
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.py")))
    (documented,) = re.findall(r'what: str\n    """([a-z, ]+)\."""', (folder / "plan.py").read_text(encoding="utf-8"))
    assert set(re.findall(r'Finding\(\s*"([a-z ]+)"', text)) == set(documented.split(", "))
