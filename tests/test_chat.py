"""`python -m ml_mamba_jax.chat`: answers, the conversation, and one line and an exit code for what cannot be used."""

import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from ml_mamba_jax import chat, checkpoint
from ml_mamba_jax.generation import generate
from ml_mamba_jax.prompt import Turn
from ml_mamba_jax.quantization import is_quantized, quantize
from ml_mamba_jax.sampling import Sampling
from ml_mamba_jax.tokenizer import Tokenizer
from tests.test_generate import printable_params
from tests.tiny_model import MODEL

TOKENIZER = Tokenizer.train([], 257)
FEW = ["--max-new-tokens", "6"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run's folder with the tiny model, two images, and a file that is the first half of an image."""
    folder = tmp_path_factory.mktemp("run")
    checkpoint.write_model(folder, MODEL.config, TOKENIZER)
    checkpoint.save(folder, 7, {checkpoint.PARAMS: printable_params()})
    for i in range(2):
        pixels = np.random.default_rng(i).integers(0, 256, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    (folder / "half.png").write_bytes((folder / "0.png").read_bytes()[:1500])
    return folder


def expected(prompt, image, **options) -> str:
    return generate(MODEL, printable_params(), TOKENIZER, [prompt], [image], max_new_tokens=6, **options)[0]


def test_a_prompt_is_answered_once(folder, capsys):
    chat.main([str(folder), "--image", str(folder / "0.png"), "--prompt", "what is this?", *FEW])
    out, err = capsys.readouterr()
    answer = expected("what is this?", folder / "0.png")
    assert out == f"{answer}\n" and len(answer) == 6
    assert f"loaded {folder} in" in err and "6 tokens in" in err and "tokens/s" in err


def test_sampling_options_are_used(folder, capsys, monkeypatch):
    answer_, used = chat._answer, []
    monkeypatch.setattr(chat, "_answer", lambda *args: (used.append(args[-1]), answer_(*args)))
    options = ["--temperature", "2.5", "--top-k", "9", "--top-p", "0.9", "--seed", "4"]
    options += ["--min-p", "0.01", "--repetition-penalty", "1.1", "--stop", "one", "--stop", "two"]
    chat.main([str(folder), "--prompt", "what is this?", *options, *FEW])
    sampling = Sampling(temperature=2.5, top_k=9, top_p=0.9, min_p=0.01, repetition_penalty=1.1)
    assert used == [{"sampling": sampling, "max_new_tokens": 6, "seed": 4, "stop_strings": ["one", "two"]}]
    answer = expected("what is this?", None, sampling=sampling, seed=4)
    assert capsys.readouterr().out.strip() == answer != expected("what is this?", None)


def test_int8_answers_with_quantised_parameters(folder, capsys, monkeypatch):
    used, stream = [], chat.Chat.stream
    monkeypatch.setattr(chat.Chat, "stream", lambda self, *a, **o: used.append(self._params) or stream(self, *a, **o))
    chat.main([str(folder), "--prompt", "what is this?", "--int8", *FEW])
    assert is_quantized(used[0])
    options = {"max_new_tokens": 6}
    answer = generate(MODEL, quantize(printable_params()), TOKENIZER, ["what is this?"], **options)[0]
    assert capsys.readouterr().out == f"{answer}\n" and len(answer) == 6


def test_a_conversation(folder, capsys, monkeypatch):
    first, second = folder / "0.png", folder / "1.png"
    lines = ["what is this?", "", "why so?", "/reset", "why so?", "/image nowhere.png", "/image", "/imag x", "/help"]
    typed = iter([*lines, f"/image {second}", "why so?"])

    def type_line(prompt):
        assert prompt == "you> "
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None  # Ctrl-D

    monkeypatch.setattr("builtins.input", type_line)
    chat.main([str(folder), "--image", str(first), *FEW])
    out, err = capsys.readouterr()
    answer = expected("what is this?", first)
    turns = [Turn("human", "what is this?"), Turn("gpt", answer), Turn("human", "why so?")]
    answers = [answer, expected(turns, first), expected("why so?", first), expected("why so?", second)]
    assert out.split() == answers and len(set(answers)) == 4
    assert "error: /image: got no file, expected /image FILE" in err
    assert "error: nowhere.png: found no such image file" in err
    assert "error: /imag: no such command, expected /image, /reset, /help or /quit" in err
    assert err.count("error: ") == 3 and "start a new conversation about an image" in err


def test_quit_and_an_answer_that_is_cut_short(folder, capsys, monkeypatch):
    typed = iter(["what is this?", "why so?", "/quit"])
    monkeypatch.setattr("builtins.input", lambda _: next(typed))
    original, asked = chat.Chat.stream, []

    def interrupted(self, question, image, **options):
        asked.append(question)
        for piece in original(self, question, image, **options):
            yield piece
            if len(asked) == 1:
                raise KeyboardInterrupt

    monkeypatch.setattr(chat.Chat, "stream", interrupted)
    chat.main([str(folder), *FEW])
    out, err = capsys.readouterr()
    begun = expected("what is this?", None)[0]
    turns = [Turn("human", "what is this?"), Turn("gpt", begun), Turn("human", "why so?")]
    assert out.split() == [begun, expected(turns, None)]
    assert "(cut short)" in err


def damaged(folder, tmp_path, how) -> str:
    """A copy of the folder that `how` has spoiled."""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    how(copy)
    return str(copy)


def flip_a_bit(copy):
    path = max((copy / "checkpoints/7/params").rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else -1)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["{run}", "--image", "{run}/nowhere.png"], 2, "nowhere.png: found no such image file"),
        (["{run}", "--image", "{run}/half.png"], 2, "half.png: cannot decode the image"),
        (["{run}", "--image", "{run}/config.json"], 2, "config.json: cannot decode the image"),
        (["{run}/checkpoints"], 4, "found no config.json, expected the folder of a run or of converted weights"),
        (["{run}/nowhere"], 4, "nowhere: found no config.json"),
        (["{run}", "--temperature", "-1"], 2, "temperature: got -1.0"),
        (["{run}", "--temperature", "warm"], 2, "argument --temperature: invalid float value: 'warm'"),
        (["{run}", "--top-k", "0"], 2, "top_k: got 0"),
        (["{run}", "--top-p", "2"], 2, "top_p: got 2.0"),
        (["{run}", "--max-new-tokens", "0"], 2, "--max-new-tokens: got 0, expected at least 1"),
        (["{run}", "--sedd", "1"], 2, "unknown option '--sedd'; did you mean '--seed'?"),
        (["{run}", "--imag", "x"], 2, "unknown option '--imag'; did you mean '--image'?"),
        (["{run}", "another"], 2, "got too many arguments: another"),
        ([], 2, "the following arguments are required: CHECKPOINT"),
    ],
)
def test_wrong_input_is_one_line_and_a_code(folder, capsys, arguments, code, message):
    with pytest.raises(SystemExit) as exit_:
        chat.main([*(a.format(run=folder) for a in arguments), "--prompt", "hi"])
    out, err = capsys.readouterr()
    assert exit_.value.code == code and out == ""
    assert err.startswith("error: ") and message in err and err.count("\n") == 1, err


@pytest.mark.parametrize(
    ("how", "code", "message"),
    [
        (flip_a_bit, 4, "the file differs from its SHA-256"),
        (lambda copy: shutil.rmtree(copy / "checkpoints"), 4, "found no checkpoint"),
        (lambda copy: (copy / "config.json").write_text("{"), 4, "config.json"),
        (lambda copy: (copy / "tokenizer.json").unlink(), 4, "found no tokenizer.json"),
        (lambda copy: (copy / "tokenizer.json").write_text("{}"), 2, "tokenizer: cannot read"),
    ],
    ids=["bit", "no step", "config", "no tokenizer", "tokenizer"],
)
def test_a_damaged_folder_is_one_line_and_a_code(folder, tmp_path, capsys, how, code, message):
    with pytest.raises(SystemExit) as exit_:
        chat.main([damaged(folder, tmp_path, how), "--prompt", "hi"])
    out, err = capsys.readouterr()
    assert exit_.value.code == code and out == ""
    assert err.startswith("error: ") and message in err and err.count("\n") == 1, err


def test_the_command_line_exits_with_the_code(tmp_path):
    command = [sys.executable, "-m", "ml_mamba_jax.chat", str(tmp_path), "--prompt", "hi"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 4 and result.stdout == ""
    assert result.stderr.startswith(f"error: {tmp_path}: found no config.json")
