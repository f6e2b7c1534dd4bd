"""convert_torch.py as its users run it: what it prints, what it refuses in one line, and that it leaves nothing behind."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch

import convert_torch
from ml_mamba_jax import chat, checkpoint
from ml_mamba_jax.config import VISION_ENCODERS
from ml_mamba_jax.convert import tables
from ml_mamba_jax.convert.check import TOLERANCE
from ml_mamba_jax.convert.families import FAMILIES
from tests.convert.hostile_files import CANARY, HOSTILE
from tests.convert.small_weights import (
    SMALL_ENCODERS,
    language,
    write_foreign_tokenizer,
    write_hf_mamba2,
    write_hf_vision,
    write_mamba_ssm,
    write_run,
    write_timm,
    write_tokenizer,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sources")
    made = {
        "mamba2": write_mamba_ssm(root / "mamba2"),
        "hf-mamba2": write_hf_mamba2(root / "hf-mamba2"),
        "timm-vit": write_timm(root / "timm-vit", SMALL_ENCODERS["clip-vit-l"]),
        "ml-mamba": write_run(root / "ml-mamba"),
    }
    made |= {kind: write_hf_vision(root / kind, kind) for kind in ("hf-clip", "hf-siglip", "hf-dinov2")}
    write_tokenizer(made["mamba2"])
    return made


def succeeds(capsys, *arguments: object) -> tuple[str, str]:
    convert_torch.main([str(argument) for argument in arguments])
    return capsys.readouterr()


def fails(capsys, *arguments: object, code: int = 2) -> str:
    """The error, without the lines of a bar before it."""
    with pytest.raises(SystemExit) as stop:
        convert_torch.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert stop.value.code == code and out == ""
    assert err.count("error: ") == 1 and "Traceback" not in err, err
    return err[err.index("error: ") :]


# What it prints


def test_help_names_every_kind_and_option():
    done = subprocess.run(
        [sys.executable, "convert_torch.py", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and done.stderr == ""
    for word in (*FAMILIES, *VISION_ENCODERS, "--to", "--dtype", "--vision", "--tokenizer", "--check", "--dry-run"):
        assert word in done.stdout, word


def test_a_real_process_converts_there_and_back(sources, tmp_path):
    def convert(*arguments: object) -> subprocess.CompletedProcess:
        command = [sys.executable, "convert_torch.py", *map(str, arguments)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)

    done = convert(sources["hf-mamba2"], tmp_path / "jax")
    assert done.returncode == 0, done.stderr
    assert "kind" in done.stdout and "hf-mamba2" in done.stdout
    assert "converting: 100%" in done.stderr and done.stderr.endswith(f"wrote {tmp_path / 'jax'}\n")
    again = convert(sources["hf-mamba2"], tmp_path / "jax")
    assert (again.returncode, again.stdout) == (2, "")
    assert again.stderr == f"error: {tmp_path / 'jax'}: exists already; name another folder or remove it\n"
    back = convert(tmp_path / "jax", tmp_path / "torch", "--to", "torch")
    assert back.returncode == 0, back.stderr
    assert back.stdout.startswith(f"{tmp_path / 'jax'} as hf-mamba2: 29 tensors, 0.00 GB\n")
    original = (sources["hf-mamba2"] / "model.safetensors").read_bytes()
    assert (tmp_path / "torch" / "model.safetensors").read_bytes() == original


def test_a_dry_run_shows_the_plan_and_writes_nothing(sources, tmp_path, capsys):
    src = sources["mamba2"]
    for arguments in ([src, "--dry-run"], [src, tmp_path / "out", "--dry-run"]):
        out, err = succeeds(capsys, *arguments)
        lines = [re.sub(" +", " ", line) for line in out.splitlines()]
        assert "kind mamba2" in lines and f"files {src / 'pytorch_model.bin'}" in lines
        assert "tensors 30, of which 30 are used" in lines and "findings 1 tied" in lines
        assert (
            "backbone.layers.{i}.mixer.conv1d.weight [80, 1, 4] float32 depthwise "
            "language/blocks/mixer/conv_weight[i] x 3" in lines
        )
        assert " tied lm_head.weight must equal language/embedding" in lines
        assert "wrote" not in err and os.listdir(tmp_path) == []


def test_a_dry_run_to_torch_shows_the_tensors(sources, tmp_path, capsys):
    succeeds(capsys, sources["ml-mamba"], tmp_path / "jax")
    out, err = succeeds(capsys, tmp_path / "jax", "--to", "torch", "--dry-run", "--dtype", "bfloat16")
    assert out.startswith(f"{tmp_path / 'jax'} as ml-mamba: ") and err == ""
    lines = [re.sub(" +", " ", line) for line in out.splitlines()]
    assert {"checkpoints/latest-checkpoint.pt", "vision/dinov2", "vision/siglip"} <= set(lines)
    assert "blocks.{i}.attn.qkv.weight [192, 64] bfloat16 transposed vision/dinov2/blocks/qkv/kernel[i] x 2" in lines
    assert os.listdir(tmp_path) == ["jax"]


def test_what_is_left_out_is_told(sources, tmp_path, capsys):
    src = write_hf_mamba2(tmp_path / "src")
    write_foreign_tokenizer(src)
    out, _ = succeeds(capsys, src, tmp_path / "out")
    assert "1 tokenizer" in out
    out, _ = succeeds(capsys, src, "--dry-run")
    assert "left out: got a vocabulary without <|endoftext|>" in out


# --check

OUTPUTS = {
    "mamba2": ["logits"],
    "hf-mamba2": ["logits"],
    "timm-vit": ["features"],
    "hf-clip": ["features"],
    "hf-siglip": ["features"],
    "hf-dinov2": ["features"],
    "ml-mamba": ["features", "visual tokens", "logits", "logits with image"],
}


def comparisons(out: str) -> dict[str, list[str]]:
    """The rows of the table of --check by the name of the output."""
    lines = out.split("output", 1)[1].splitlines()
    assert re.split("  +", lines[0].strip()) == ["max difference", "mean difference", "largest value", "top-1", "KL"]
    rows = [re.split("  +", line) for line in lines[1:]]
    return {row[0]: row[1:] for row in rows}


def assert_alike(row: list[str], is_logits: bool, tolerance: float = TOLERANCE["float32"]) -> None:
    highest, mean, largest = map(float, row[:3])
    assert 0 < mean <= highest <= tolerance * largest
    if is_logits:
        assert row[3] == "100.0%" and abs(float(row[4])) < 1e-6
    else:
        assert len(row) == 3


@pytest.mark.parametrize("kind", FAMILIES)
def test_check_compares_both_models(sources, tmp_path, capsys, kind):
    out, _ = succeeds(capsys, sources[kind], tmp_path / "out", "--check")
    rows = comparisons(out)
    assert list(rows) == OUTPUTS[kind]
    for name, row in rows.items():
        assert_alike(row, name.startswith("logits"))
    assert (tmp_path / "out").is_dir()


@pytest.mark.parametrize(
    ("kind", "name"),
    [("hf-dinov2", "dinov2-vit-l"), ("hf-siglip", "siglip-vit-so400m"), ("hf-clip", "clip-vit-l")],
)
def test_check_of_resampled_positions(sources, tmp_path, capsys, monkeypatch, kind, name):
    succeeds(capsys, sources[kind], tmp_path / "as-it-is")
    (encoder,) = checkpoint.load_config(tmp_path / "as-it-is").vision
    larger = dataclasses.replace(encoder, image_size=48)
    monkeypatch.setitem(VISION_ENCODERS, name, larger)
    out, _ = succeeds(capsys, sources[kind], tmp_path / "out", "--encoder", name, "--check")
    assert "1 resampled" in out and checkpoint.load_config(tmp_path / "out").vision == (larger,)
    assert_alike(comparisons(out)["features"], False)


def test_check_in_half_precision_and_back(sources, tmp_path, capsys):
    """Differences are larger, and are allowed to be."""
    out, _ = succeeds(capsys, sources["timm-vit"], tmp_path / "jax", "--check", "--dtype", "bfloat16")
    highest, _, largest = map(float, comparisons(out)["features"])
    assert TOLERANCE["float32"] < highest / largest < TOLERANCE["bfloat16"]
    succeeds(capsys, sources["timm-vit"], tmp_path / "exact")
    out, _ = succeeds(capsys, tmp_path / "exact", tmp_path / "torch", "--to", "torch", "--check", "--dtype", "float16")
    highest, _, largest = map(float, comparisons(out)["features"])
    assert TOLERANCE["float32"] / 10 < highest / largest < TOLERANCE["float16"]


@pytest.mark.parametrize("direction", ["jax", "torch"])
def test_check_catches_a_wrong_conversion(sources, tmp_path, capsys, monkeypatch, direction):
    """Two tensors of one shape that have changed places."""
    src = sources["timm-vit"]
    if direction == "torch":
        succeeds(capsys, src, tmp_path / "jax")
        src = tmp_path / "jax"
    right, swapped, calls = tables.timm_vit, {"norm1.weight": "norm2.weight", "norm2.weight": "norm1.weight"}, []

    def wrong(*args):
        calls.append(args)
        if len(calls) > (1 if direction == "jax" else 2):
            return right(*args)  # to torch it is read for the report and for the file, and when that is read back
        return [p._replace(key=re.sub(r"norm[12]\.weight", lambda m: swapped[m[0]], p.key)) for p in right(*args)]

    monkeypatch.setattr(tables, "timm_vit", wrong)
    error = fails(capsys, src, tmp_path / "out", "--to", direction, "--check")
    assert re.match(r"error: .*: features differ by [\d.e+-]+, expected at most 1e-03 of ", error)
    assert "max difference" in error
    assert os.listdir(tmp_path) == ([] if direction == "jax" else ["jax"])


# What it refuses


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_one_line_and_leave_nothing(tmp_path, capsys, name):
    folder = tmp_path / "src"
    folder.mkdir()
    path = HOSTILE[name].build(folder)
    before = sorted(folder.rglob("*"))
    start = time.perf_counter()
    error = fails(capsys, path, tmp_path / "out")
    assert time.perf_counter() - start < 60
    assert re.search(HOSTILE[name].expected, error) and str(path) in error and error.count("\n") == 1
    assert os.listdir(tmp_path) == ["src"] and sorted(folder.rglob("*")) == before and not (folder / CANARY).exists()


def test_a_hostile_file_in_a_real_process(tmp_path):
    path = HOSTILE["os_system"].build(tmp_path)
    command = [sys.executable, "convert_torch.py", str(path), str(tmp_path / "out"), "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "") and not (tmp_path / CANARY).exists()
    assert done.stderr.startswith(f"error: {path}: asks for posix.system for 'w'") and done.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == ["weights.pt"]


HOSTILE_VISION = ["os_system", "truncated_safetensors", "missing_file", "folder_without_weights", "lfs_pointer"]


@pytest.mark.parametrize("name", HOSTILE_VISION)
def test_a_hostile_encoder_of_a_good_run(sources, tmp_path, capsys, name):
    (tmp_path / "src").mkdir()
    path = HOSTILE[name].build(tmp_path / "src")
    error = fails(capsys, sources["ml-mamba"], tmp_path / "out", "--vision", path)
    assert re.search(HOSTILE[name].expected, error) and error.count("\n") == 1
    assert os.listdir(tmp_path) == ["src"] and not (tmp_path / "src" / CANARY).exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["{src}", "{out}", "--chek"], 2, "unknown option '--chek'; did you mean '--check'?"),
        (["{src}", "{out}", "--kind", "mamba"], 2, "--kind: unknown kind 'mamba'; did you mean 'mamba2'?"),
        (["{src}", "{out}", "--kind", "hf-dino"], 2, "--kind: unknown kind 'hf-dino'; did you mean 'hf-dinov2'?"),
        (
            ["{src}", "{out}", "--to", "torch", "--kind", "mamba2"],
            2,
            "unknown kind 'mamba2'; did you mean 'hf-mamba2'?",
        ),
        (["{src}", "{out}", "--kind", "timm-vit"], 2, "found no tensor patch_embed.proj.weight, expected a vision"),
        (["{src}", "{out}", "--dtype", "bfloat"], 2, "--dtype: unknown dtype 'bfloat'; did you mean 'bfloat16'?"),
        (["{src}", "{out}", "--to", "pytorch"], 2, "--to: unknown to 'pytorch'; did you mean 'torch'?"),
        (["{src}", "{out}", "--encoder", "dinov2"], 2, "got encoder dinov2 for a mamba2, expected it for an encoder"),
        (["{src}", "{out}", "--vision", "x"], 2, "got vision weights for a mamba2, expected them for a run"),
        (["{src}", "{out}", "--tokenizer", "{src}/no"], 2, "/no: found no such tokenizer, expected a tokenizer.json"),
        (["{src}", "{out}", "--to", "torch", "--encoder", "x"], 2, "--encoder: got one with --to torch"),
        (["{src}"], 2, "OUT: got none, expected the folder to write"),
        ([], 2, "the following arguments are required: SRC"),
        (["{src}", "{out}", "more"], 2, "got too many arguments: more"),
        (["{src}/nowhere", "{out}"], 2, "nowhere: found no such file; check the path"),
        (["{src}/nowhere", "{out}", "--to", "torch"], 4, "nowhere: found no config.json, expected the folder of a run"),
        (["{src}", "{src}"], 2, "exists already; name another folder or remove it"),
        (
            ["{src}", "{src}/config.json/out"],
            2,
            "cannot be written: {src}/config.json is no folder that you may write to",
        ),
    ],
)
def test_wrong_arguments_are_one_line(sources, tmp_path, capsys, arguments, code, message):
    names = {"src": sources["mamba2"], "out": tmp_path / "out"}
    error = fails(capsys, *(argument.format(**names) for argument in arguments), code=code)
    assert message.format(**names) in error and error.count("\n") == 1
    assert os.listdir(tmp_path) == []


def test_all_problems_are_printed_with_the_file(tmp_path, capsys):
    tensors = language()
    del tensors["backbone.norm_f.weight"]
    tensors["backbone.layers.2.mixer.D"] = torch.full((4,), float("nan"))
    src = write_mamba_ssm(tmp_path / "src", tensors)
    error = fails(capsys, src, tmp_path / "out")
    assert error.startswith(f"error: {src}: 2 problems, nothing was written\n")
    assert "backbone.norm_f.weight" in error and "backbone.layers.2.mixer.D" in error
    assert os.listdir(tmp_path) == ["src"]


def test_a_config_of_another_model_names_its_field(tmp_path, capsys):
    src = write_mamba_ssm(tmp_path / "src", attn_layer_idx=[9])
    error = fails(capsys, src, tmp_path / "out")
    assert error == (
        f"error: {src}/config.json: attn_layer_idx: got [9], expected []: no other attention layers here\n"
    )


def test_flax_weights_are_no_torch_weights(tmp_path, capsys):
    path = tmp_path / "w.safetensors"
    safetensors.torch.save_file({"params/language/blocks/mixer/in_proj/kernel": torch.ones(2)}, path)
    assert "w.safetensors: got weights for flax, expected one of" in fails(capsys, path, tmp_path / "out")


# What becomes of the folder


def test_an_encoder_alone_cannot_chat(sources, tmp_path, capsys):
    succeeds(capsys, sources["timm-vit"], tmp_path / "out")
    with pytest.raises(SystemExit) as stop:
        chat.main([str(tmp_path / "out"), "--prompt", "what?"])
    out, err = capsys.readouterr()
    assert (stop.value.code, out) == (4, "")
    assert (
        err
        == f"error: {tmp_path}/out: holds image encoders alone, expected a model with a language part; choose another\n"
    )


def test_a_run_without_encoders_cannot_chat(tmp_path, capsys):
    src = write_run(tmp_path / "src", encoders=False)
    succeeds(capsys, src, tmp_path / "out")
    with pytest.raises(SystemExit) as stop:
        chat.main([str(tmp_path / "out"), "--prompt", "what?"])
    out, err = capsys.readouterr()
    assert (stop.value.code, out) == (4, "") and err.count("\n") == 1
    assert "holds no parameters of the image encoders dinov2, siglip; convert again with their weights" in err


def test_a_language_model_chats_about_text_only(sources, tmp_path, capsys):
    succeeds(capsys, sources["mamba2"], tmp_path / "out")
    chat.main([str(tmp_path / "out"), "--prompt", "what?", "--max-new-tokens", "3"])
    assert "tokens in" in capsys.readouterr().err
    from PIL import Image

    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")
    with pytest.raises(SystemExit) as stop:
        chat.main([str(tmp_path / "out"), "--prompt", "what?", "--image", str(tmp_path / "image.png")])
    _, err = capsys.readouterr()
    assert stop.value.code == 2 and err.count("error: ") == 1 and "Traceback" not in err
    assert err.endswith("error: image: got one, but this model has no image encoders; ask without an image\n")


def test_the_report_is_json_too(sources, tmp_path, capsys):
    succeeds(capsys, sources["hf-siglip"], tmp_path / "out")
    record = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert {finding["what"] for finding in record["findings"]} == {"not needed"}
    assert {tensor["transform"] for tensor in record["tensors"]} == {"same", "transposed", "patches"}
