"""The check of a data set: everything that is wrong in one pass, and samples that show what is learnt."""

import json
import subprocess
import sys
import time

import pytest
from PIL import Image

from ml_mamba_jax.data import check, shards, show
from ml_mamba_jax.data.records import Record
from ml_mamba_jax.data.samples import has_target, tokenize
from ml_mamba_jax.errors import InputError
from ml_mamba_jax.image import check_image, check_image_ends, read_image
from ml_mamba_jax.prompt import Turn, render
from ml_mamba_jax.tokenizer import Tokenizer
from tests.data.own_data import conversation, write_llava
from tests.real_data import IMAGES, LOGO


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> str:
    return str(Tokenizer.train(["What is it? It is 3."] * 3, 300).save(tmp_path_factory.mktemp("tokenizer")))


def run(capsys, *arguments) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stop:
        check.main([*map(str, arguments), "--model", "tiny"])
    output = capsys.readouterr()
    return stop.value.code, output.out + output.err


def spoil(file, images):
    """Break ten records of a data set of at least 40; returns what the report has to say of each."""
    entries = json.loads(file.read_text())
    for i in range(1, 41, 4):
        entries[i]["image"] = f"{i}.jpg"
        Image.new("RGB", (32, 32)).save(images / f"{i}.jpg")
    (images / "1.jpg").unlink()
    (images / "5.jpg").write_bytes(b"")
    (images / "9.jpg").write_bytes(b"<html>not found</html>")
    (images / "13.jpg").write_bytes((images / "13.jpg").read_bytes()[:-50])
    Image.new("1", (8000, 8000)).save(images / "17.jpg", format="PNG")
    entries[21]["conversations"][1]["value"] = None
    entries[25]["conversations"] = []
    entries[29]["image"] = "../29.jpg"
    entries[33] = 7
    entries[37]["conversations"] = conversation("<image>\n" + "long " * 300, "Never reached.")
    file.write_text(json.dumps(entries))
    return {
        1: "found no such image file",
        5: "cannot decode",
        9: "cannot decode",
        13: "cannot decode",
        17: "got 8000 x 8000 pixels",
        21: "conversations[1].value: got NoneType",
        25: "got an empty list",
        29: "expected a path inside the folder",
        33: "got int, expected an object",
        37: "the first answer begins after 200 tokens",
    }


@pytest.mark.parametrize("options", [(), ("--decode",), ("--workers", "2")])
def test_all_faults_are_listed_in_one_pass(tmp_path, capsys, tokenizer, monkeypatch, options):
    monkeypatch.setattr(check, "RECORDS_PER_TASK", 7)
    file, images = write_llava(tmp_path, 44)
    expected = spoil(file, images)
    code, output = run(
        capsys, file, "--images", images, "--tokenizer", tokenizer, "--max-tokens", "200", "--workers", "1", *options
    )
    assert code == 2
    listed = [line for line in output.splitlines() if line.startswith("  chat.json[")]
    assert len(listed) == len(expected)
    for i, message in expected.items():
        assert [line for line in listed if line.startswith(f"  chat.json[{i}]: ") and message in line], (i, message)
    assert "44 records, 28 with an image: 10 problems" in output
    assert "malformed records: 4\n" in output
    assert "images that are missing or cannot be read: 5\n" in output


def test_names_that_no_file_has_and_halves_of_characters_are_malformed(tmp_path, capsys):
    lines = ['{"image": "%s.jpg", "caption": "A."}' % ("x" * 300), r'{"question": "\ud83d?", "answer": "A."}']
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, r'{"image": "\udc00", "caption": "A."}', '{"caption": " "}']))
    code, output = run(capsys, tmp_path / "a.jsonl", "--workers", "1")
    assert code == 2 and "4 records, 0 with an image: 3 problems" in output
    assert "a.jsonl:1: image: got 'xxx" in output and "File name too long" in output
    assert r"a.jsonl:2: got half of a pair of characters in '\ud83d?', expected whole ones" in output
    assert r"a.jsonl:3: got half of a pair of characters in '\udc00'" in output
    assert "a.jsonl:4: an answer is empty: the model learns to say nothing" in output
    with pytest.raises(InputError, match=r"3 of 4 records cannot be used(?s:.*)a.jsonl:1: (?s:.*)a.jsonl:2: "):
        shards.pack(shards.Packing((tmp_path / "a.jsonl",), tmp_path), tmp_path / "packed", 1)


def test_a_damaged_description_of_a_data_set_is_named(tmp_path, capsys):
    file, images = write_llava(tmp_path, 4)
    shards.pack(shards.Packing((file,), images), tmp_path / "packed", 1)
    for name in ("dataset_info.json", "features.json", "contents.json"):
        whole = (tmp_path / "packed" / name).read_text()
        for damaged in (whole[: len(whole) // 2], "{}", ""):
            (tmp_path / "packed" / name).write_text(damaged)
            code, output = run(capsys, tmp_path / "packed", "--workers", "1")
            assert code == 2 and output.count("error: ") == 1 and name in output, (name, damaged, output)
            assert "Traceback" not in output
        (tmp_path / "packed" / name).write_text(whole)
    assert run(capsys, tmp_path / "packed", "--workers", "1")[0] == 0


def test_what_only_a_decoder_sees_is_found_by_one(tmp_path, capsys):
    file, images = write_llava(tmp_path, 300, n_images=1)
    picture = bytearray(LOGO.read_bytes())
    picture[len(picture) // 2] ^= 1
    (images / "coco" / "0.jpg").write_bytes(picture)
    assert run(capsys, file, "--images", images, "--show", "0")[0] == 0
    code, output = run(capsys, file, "--images", images, "--show", "0", "--decode")
    assert code == 2 and output.count("cannot decode") == 225


def test_a_clean_data_set_is_shown_and_so_is_the_packed_one(tmp_path, capsys, tokenizer):
    file, images = write_llava(tmp_path, 12)
    options = ("--tokenizer", tokenizer, "--show", "2", "--html", tmp_path / "page.html")
    code, output = run(capsys, file, "--images", images, *options)
    assert code == 0
    assert "12 records, 9 with an image: clean" in output
    assert "chat.json[0]: text alone" in output and "chat.json[6]: image 24 x 20, 16 visual tokens" in output
    assert "<|user|>\nWhat is 0?<|endoftext|>\n<|assistant|>\n⟦It is 0.<|endoftext|>⟧" in output
    page = (tmp_path / "page.html").read_text()
    assert page.count("<section>") == 2 and page.count("data:image/png;base64,") == 1
    assert '<span class="learnt">It is 6.&lt;|endoftext|&gt;</span>' in page

    shards.pack(shards.Packing((file,), images), tmp_path / "packed", 1)
    code, output = run(capsys, tmp_path / "packed", *options)
    assert code == 0
    assert "12 records, 9 with an image: clean" in output and "00000006-6: image 24 x 20" in output
    assert run(capsys, tmp_path / "packed", file)[0] == 2


def test_a_file_that_breaks_off_is_one_more_fault(tmp_path, capsys):
    file, images = write_llava(tmp_path, 5)
    (images / "coco" / "1.png").unlink()
    file.write_text(file.read_text()[:-30])
    code, output = run(capsys, file, "--images", images)
    assert code == 2
    assert "1.png: found no such image file" in output
    assert "cannot read the records: broken at record 4" in output


def test_an_image_mark_without_an_image_is_pointed_out(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text(json.dumps({"conversations": conversation("<image>\nQ", "A")}) + "\n")
    code, output = run(capsys, tmp_path / "a.jsonl")
    assert code == 0 and "a.jsonl:1: begins with <image> but names no image" in output


def test_without_records_nothing_is_clean(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text("")
    assert run(capsys, tmp_path / "a.jsonl")[0] == 2


def test_grey_is_what_is_not_learnt_and_crossed_out_what_is_cut():
    tokenizer = Tokenizer.train([], 257)
    record = Record("r", None, (Turn("human", "Q"), Turn("gpt", "A\x1b[31mé"), Turn("human", "R"), Turn("gpt", "B")))
    parts = show.spans(record, tokenizer, 55, "zephyr")
    read, learnt, again, cut = parts
    assert (read.fate, learnt.fate, again.fate, cut.fate) == ("read", "learnt", "read", "cut")
    assert sum(part.tokens for part in parts if part.fate != "cut") == 55
    assert learnt.text == "A\x1b[31mé<|endoftext|>"
    printed = show.terminal(parts, colour=True)
    assert printed.startswith(
        "\x1b[90m<|user|>\nQ<|endoftext|>\n<|assistant|>\n\x1b[0mA\ufffd[31mé<|endoftext|>\x1b[90m"
    )
    assert "\x1b[90;9m" in printed and printed.endswith("\x1b[0m")
    assert "⟦A\ufffd[31mé<|endoftext|>⟧" in show.terminal(parts, colour=False)
    untold = show.spans(record, None, 1, "zephyr")
    assert [part.fate for part in untold] == ["read", "learnt", "read", "learnt"]


@pytest.mark.parametrize("max_tokens", range(1, 60))
def test_has_target_says_what_tokenize_does(max_tokens):
    tokenizer = Tokenizer.train([], 257)
    for question in ("", "Q", "ééé", "a longer one"):
        turns = (Turn("human", question), Turn("gpt", "A"))
        try:
            tokenize(turns, tokenizer, max_tokens, "r")
            expected = True
        except InputError:
            expected = False
        assert has_target(turns, tokenizer, max_tokens) == expected
        assert has_target(turns, tokenizer, max_tokens, form="caption")
    assert render(turns[:1])


@pytest.mark.parametrize("path", IMAGES)
def test_real_images_pass_and_cut_ones_do_not(path, tmp_path):
    data = path.read_bytes()
    check_image_ends(path)
    check_image(data, "image")
    for part in (0.0, 0.1, 0.9, 0.999):
        cut = data[: int(part * len(data))]
        (tmp_path / path.name).write_bytes(cut)
        for look in (check_image_ends, read_image):
            with pytest.raises(InputError, match=f"{path.name}: cannot decode"):
                look(tmp_path / path.name)
        with pytest.raises(InputError, match="image: cannot decode"):
            check_image(cut, "image")


def test_two_thousand_records_a_second_on_one_core(tmp_path):
    """A small part of what a core does when it has nothing else to do; docs/data.md has the speed."""
    file, images = write_llava(tmp_path, 6000, n_images=50)
    command = [sys.executable, "-m", "ml_mamba_jax.data.check", file, "--images", images, "--workers", "1"]
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - started
    assert done.returncode == 0, done.stderr
    assert 6000 / seconds > 1000
