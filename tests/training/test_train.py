"""train.py as its users run it: killed and resumed bit by bit, and one line for whatever is wrong."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import train
from configs import PRESETS
from ml_mamba_jax import checkpoint, generate, load
from ml_mamba_jax.data.records import Record
from ml_mamba_jax.errors import InputError
from ml_mamba_jax.prompt import Turn
from ml_mamba_jax.tokenizer import Tokenizer
from ml_mamba_jax.training.inputs import open_tokenizer
from tests.test_docs import BLOCK, NEEDS_RUN
from tests.training import short_run

ROOT = Path(__file__).parents[2]
SMALL = ["--steps=40", "--batch-size=4", "--save-every=20", "--data.train-scenes=40", "--data.test-scenes=4"]
SMALL += ["--eval-batch-size=8"]


def command(folder: Path, *options: str, preset: str = "digits-vqa") -> list[str]:
    places = ["--runs", str(folder / "runs"), "--data.folder", str(folder / "data")]
    return [sys.executable, "train.py", preset, *places, *options]


def run(folder: Path, *options: str, **kwargs) -> subprocess.CompletedProcess:
    environment = {**os.environ, "XLA_FLAGS": ""}
    return subprocess.run(
        command(folder, *options, **kwargs), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )


def losses(run_folder: Path) -> list[tuple[int, float]]:
    return [
        (line["step"], line["loss"])
        for line in map(json.loads, (run_folder / "metrics.jsonl").read_text().splitlines())
    ]


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    """A run of 40 steps without interruption."""
    folder = tmp_path_factory.mktemp("straight")
    done = run(folder, *SMALL)
    assert done.returncode == 0, done.stderr
    assert "step 40/40" in done.stdout
    return folder


def test_a_run_leaves_everything_a_user_looks_for(straight):
    folder = straight / "runs" / "digits-vqa"
    names = {path.name for path in folder.iterdir()}
    assert names == {
        *("config.json", "recipe.json", "inputs.json", "tokenizer.json", "checkpoints"),
        *("metrics.jsonl", "loss.png", "eval.json", "samples.png", "example.png", "example.txt"),
    }
    scores = json.loads((folder / "eval.json").read_text())
    assert list(scores["single_digit"]) == ["accuracy", "count", "majority_baseline"]
    assert scores["overall"]["count"] == sum(s["count"] for kind, s in scores.items() if kind != "overall")
    assert [step for step, _ in losses(folder)] == list(range(1, 41))
    assert losses(folder)[-1][1] < losses(folder)[0][1]


def test_the_examples_that_need_a_run_work_beside_one(straight):
    blocks = [
        block
        for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
        for block in BLOCK.findall(path.read_text(encoding="utf-8"))
        if NEEDS_RUN in block
    ]
    assert len(blocks) >= 2
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", "\n".join(blocks)],
        cwd=straight,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("example", sorted(ROOT.glob("examples/*.py")), ids=lambda path: path.name)
def test_notebooks_run_beside_a_run(straight, tmp_path, example):
    (tmp_path / "runs").symlink_to(straight / "runs")
    done = subprocess.run(
        [sys.executable, "-W", "error", str(example)],
        cwd=tmp_path,
        env={**os.environ, "MPLBACKEND": "agg"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} >= {"picture.png", "picture.state"}


def test_chat_answers_the_example(straight):
    folder = straight / "runs" / "digits-vqa"
    arguments = [str(folder), "--image", str(folder / "example.png"), "--prompt", (folder / "example.txt").read_text()]
    done = subprocess.run(
        [sys.executable, "-m", "ml_mamba_jax.chat", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    model, params, tokenizer = load(folder)
    question, image = (folder / "example.txt").read_text(), folder / "example.png"
    (expected,) = generate(model, params, tokenizer, [question], [image], max_new_tokens=256)
    assert done.stdout.strip() == expected
    assert " tokens in " in done.stderr


@pytest.mark.full
def test_a_killed_run_goes_on_bit_by_bit(straight, tmp_path):
    shutil.copytree(straight / "data", tmp_path / "data")
    process = subprocess.Popen(
        command(tmp_path, *SMALL), cwd=ROOT, env={**os.environ, "XLA_FLAGS": ""}, stdout=subprocess.DEVNULL
    )
    folder = tmp_path / "runs" / "digits-vqa"
    deadline = time.monotonic() + 240
    while not (folder / "metrics.jsonl").is_file() or len((folder / "metrics.jsonl").read_bytes().splitlines()) < 25:
        assert process.poll() is None, "ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert checkpoint.steps(folder) == [20]

    resumed = run(tmp_path, *SMALL, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed after step 20" in resumed.stdout
    whole = straight / "runs" / "digits-vqa"
    assert losses(folder) == losses(whole)
    for a, b in zip(*(jax.tree.leaves(checkpoint.load_params(f)) for f in (folder, whole)), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))

    again = run(tmp_path, *SMALL, "--resume")
    assert again.returncode == 0, again.stderr
    assert "step 21/40" not in again.stdout
    assert losses(folder) == losses(whole)


def test_the_tokenizer_of_a_recipe_knows_the_end_of_its_prompt_format(tmp_path):
    pure = PRESETS["digits-vqa"]
    pure = dataclasses.replace(pure, model=pure.model.replace(prompt_format="pure"))
    records = [Record("r", None, (Turn("human", "Which digit?"), Turn("gpt", "7")))] * 9
    tokenizer = open_tokenizer(pure, tmp_path, records, 0)
    assert tokenizer.encode("7</s>")[1:] == [tokenizer.end_id("pure")] != [tokenizer.eos_id]
    assert len(tokenizer.encode("In: Which digit?\nOut: ")) < 12, "it was trained on text in that format"
    Tokenizer.train([], 257).save(tmp_path)
    with pytest.raises(InputError, match="got a vocabulary without </s>"):
        open_tokenizer(dataclasses.replace(pure, tokenizer=str(tmp_path)), tmp_path, records, 0)


@pytest.mark.parametrize(
    "options, code, message",
    [
        (["--resume", "--model.language.n-layers", "3"], 4, "another recipe (model.language.n_layers: 2 -> 3)"),
        ([], 2, "holds a run at step 40; pass --resume to go on, or another --name"),
        (["--name", "b", "--batch-size", "0"], 2, "batch_size: got 0, expected at least 1"),
        (["--name", "b", "--mesh.fsdp", "3"], 2, "mesh: got data x fsdp x tensor = -1 x 3 x 1"),
        (["--name", "b", "--micro-batches", "3"], 2, "batch_size: got 4, expected a multiple of 3"),
        (["--name", "b", "--data.max-tokens", "5"], 2, "got no target among the first 5 of"),
        (["--name", "b", "--data.json-file", "nowhere.json"], 2, "nowhere.json: found no such file"),
        (["--name", "b", "--tokenizer", "./nowhere.json"], 2, "tokenizer: found no"),
        (["--name", "b", "--data.no-digits"], 2, "data: got no records to learn from; pass --data.prepared FOLDER"),
        (["--name", "b", "--no-from-scratch"], 2, "init: got no weights for language, vision/dinov2, vision/siglip"),
    ],
)
def test_wrong_input_is_one_line(straight, monkeypatch, capsys, options, code, message):
    """In this process, but for the first of all."""
    if code == 4:
        done = run(straight, *SMALL, *options)
        exit_code, said = done.returncode, done.stderr
    else:
        monkeypatch.setattr(sys, "argv", command(straight, *SMALL, *options)[1:])
        with short_run.quickly(), pytest.raises(SystemExit) as stop:
            train.main()
        exit_code, said = stop.value.code, capsys.readouterr().err
    assert exit_code == code, said
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, said
    assert message in lines[0]
    assert "Traceback" not in said
    assert not (straight / "runs" / "b" / "checkpoints").exists()


def test_unknown_names_get_a_suggestion(tmp_path):
    done = run(tmp_path, preset="digit-vqa")
    assert done.returncode == 2
    assert done.stderr.startswith("error: unknown preset 'digit-vqa'; did you mean 'digits-vqa'? (known: digits-vqa, ")
    done = run(tmp_path, "--optim.peek-lr", "1")
    assert done.returncode == 2
    assert done.stderr.startswith("error: Unrecognized options: --optim.peek-lr, 1; did you mean --optim.peak-lr")
    assert done.stderr.count("\n") == 1
    done = run(tmp_path, "--steps", "many")
    assert done.returncode == 2
    assert done.stderr.startswith("error: Error parsing --steps: ")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "runs").exists()
