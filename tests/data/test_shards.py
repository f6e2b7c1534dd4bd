"""Packing: the same records by any number of workers, whole or not at all, and not from the start after a kill."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ml_mamba_jax.data import prepare, shards
from ml_mamba_jax.data.shards import Packing, pack
from ml_mamba_jax.data.source import RecordSource
from ml_mamba_jax.errors import InputError
from ml_mamba_jax.prompt import Turn
from ml_mamba_jax.tokenizer import Tokenizer
from tests.data.own_data import conversation, write_images, write_llava

ROOT = Path(__file__).parents[2]


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(shards, "RECORDS_PER_SHARD", 10)


def read(folder: Path) -> list:
    return list(RecordSource.open(folder, "train"))


def test_records_keep_their_order_and_the_bytes_of_their_images(tmp_path, small_shards):
    file, images = write_llava(tmp_path, 35)
    pack(Packing((file,), images), tmp_path / "one", workers=1)
    pack(Packing((file,), images), tmp_path / "two", workers=2)
    records = read(tmp_path / "one")
    assert records == read(tmp_path / "two")
    for i, (record, entry) in enumerate(zip(records, json.loads(file.read_text()), strict=True)):
        assert record.id == f"{i:08d}-{i}"
        assert record.image == ((images / entry["image"]).read_bytes() if "image" in entry else None)
        assert record.turns == tuple(Turn(t["from"], t["value"]) for t in entry["conversations"])
    assert len(list((tmp_path / "one").glob("*.array_record-*-of-00004"))) == 4
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_several_files_are_one_data_set_and_lines_are_read(tmp_path, capsys):
    write_images(tmp_path, ["a.jpg", "b.png"])
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.jpg", "caption": "A cat."}\n{"caption": "Text."}\n')
    (tmp_path / "more.json").write_text(json.dumps([{"image": "b.png", "question": "What?", "answer": "A dog."}]))
    tokenizer = Tokenizer.train([], 257).save(tmp_path)
    options = ["--out", str(tmp_path / "packed"), "--workers", "1", "--tokenizer", str(tokenizer)]
    prepare.main([str(tmp_path), str(tmp_path / "more.json"), *options])
    assert len(list((tmp_path / "packed").glob("lengths-train-*.npz"))) == 1
    assert "packed: 3 train records" in capsys.readouterr().out
    assert [(record.turns[1].text, record.image is None) for record in read(tmp_path / "packed")] == [
        ("A cat.", False),
        ("Text.", True),
        ("A dog.", False),
    ]


PACK = """
import sys, time
from pathlib import Path
from ml_mamba_jax.data import shards
shards.RECORDS_PER_SHARD = 5
written = shards.write_shard
def slowly(task):
    time.sleep(0.05)
    return written(task)
shards.write_shard = slowly
shards.pack(shards.Packing((Path(sys.argv[1]),), Path(sys.argv[2])), Path(sys.argv[3]), workers=1)
"""


def test_after_a_kill_nothing_is_in_place_and_whole_shards_are_kept(tmp_path, monkeypatch):
    file, images = write_llava(tmp_path, 100)
    target, aside = tmp_path / "packed", tmp_path / ".packed.partial"
    killed = 0
    for seconds in (0.2, 0.3, 0.35):
        done = len(list(aside.glob("*.json"))) if aside.exists() else 0
        process = subprocess.Popen([sys.executable, "-c", PACK, file, images, target], cwd=ROOT)
        while not aside.exists() or len(list(aside.glob("*.json"))) == done:
            time.sleep(0.01)
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
        process.wait()
        killed += not target.exists()
    assert killed == 3
    whole = {path: path.stat().st_mtime_ns for path in aside.glob("*.json")}
    assert 3 <= len(whole) < 20
    kept = {path.name.removesuffix(".json"): path.with_suffix("").stat().st_ino for path in whole}

    monkeypatch.setattr(shards, "RECORDS_PER_SHARD", 5)
    pack(Packing((file,), images), target, workers=1)
    assert {name: (target / name).stat().st_ino for name in kept} == kept
    pack(Packing((file,), images), tmp_path / "at once", workers=1)
    assert read(target) == read(tmp_path / "at once")
    assert sorted(p.name for p in target.iterdir()) == sorted(p.name for p in (tmp_path / "at once").iterdir())


def test_shards_of_other_records_or_of_another_length_are_not_kept(tmp_path, small_shards, monkeypatch):
    file, images = write_llava(tmp_path, 30)
    target, aside = tmp_path / "packed", tmp_path / ".packed.partial"
    monkeypatch.setattr(shards, "_describe_whole", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        pack(Packing((file,), images), target, workers=1)
    monkeypatch.undo()
    monkeypatch.setattr(shards, "RECORDS_PER_SHARD", 10)
    before = {path.name: path.stat().st_ino for path in aside.glob("*-of-00003")}
    assert len(before) == 3
    entries = json.loads(file.read_text())
    entries[12]["conversations"][1]["value"] = "Something else."
    file.write_text(json.dumps(entries))
    os.truncate(sorted(aside.glob("*-of-00003"))[2], 99)
    pack(Packing((file,), images), target, workers=1)
    after = {path.name: path.stat().st_ino for path in target.glob("*-of-00003")}
    assert [before[name] == after[name] for name in sorted(after)] == [True, False, False]
    assert read(target)[12].turns[1].text == "Something else."


def test_bad_records_are_left_out_only_up_to_a_part(tmp_path, small_shards):
    file, images = write_llava(tmp_path, 30, n_images=10)
    (images / "coco" / "1.png").write_bytes(b"<html>")
    users = [i for i in range(30) if i % 4 and i % 10 == 1]
    assert len(users) == 3
    with pytest.raises(InputError, match=r"3 of 30 records cannot be used, more than the 3\.00%"):
        pack(Packing((file,), images, max_bad=0.03), tmp_path / "packed", workers=1)
    assert not (tmp_path / "packed").exists()
    shutil.copytree(tmp_path, tmp_path / "mended")
    shutil.copy(images / "coco" / "3.png", images / "coco" / "1.png")
    pack(Packing((file,), images), tmp_path / "packed", workers=1)
    assert len(read(tmp_path / "packed")) == 30

    file, images = tmp_path / "mended" / "chat.json", tmp_path / "mended" / "images"
    shutil.rmtree(tmp_path / "packed")
    pack(Packing((file,), images, max_bad=0.1), tmp_path / "packed", workers=1)
    ids = [int(record.id[:8]) for record in read(tmp_path / "packed")]
    assert ids == [i for i in range(30) if i not in users]
    left_out = (tmp_path / "packed" / shards.LEFT_OUT_FILE).read_text().splitlines()
    assert [line.split(":")[0] for line in left_out] == [f"chat.json[{i}]" for i in users]


def test_an_image_under_another_ending_is_taken_only_when_asked_for(tmp_path):
    write_images(tmp_path, ["book [1].png"])
    (tmp_path / "a.jsonl").write_text('{"image": "book [1].jpg", "caption": "A book."}\n')
    with pytest.raises(InputError, match=r"found no such image file; there is book \[1\]\.png: pass --any-suffix"):
        pack(Packing((tmp_path / "a.jsonl",), tmp_path), tmp_path / "packed", workers=1)
    pack(Packing((tmp_path / "a.jsonl",), tmp_path, any_suffix=True), tmp_path / "packed", workers=1)
    assert read(tmp_path / "packed")[0].image == (tmp_path / "book [1].png").read_bytes()


def test_another_data_set_in_the_place_and_a_damaged_one_are_refused(tmp_path, small_shards):
    file, images = write_llava(tmp_path, 12)
    target = tmp_path / "packed"
    pack(Packing((file,), images), target, workers=1)
    pack(Packing((file,), images), target, workers=1)
    file.write_text(json.dumps([{"conversations": conversation("Q", "A")}]))
    with pytest.raises(InputError, match="packed: got something else there"):
        pack(Packing((file,), images), target, workers=1)
    copy = tmp_path / "copy"
    shutil.copytree(target, copy)
    os.truncate(sorted(copy.glob("*-of-00002"))[1], 100)
    with pytest.raises(InputError, match=r"00001-of-00002: got 100 bytes, expected \d+ bytes; copy or prepare"):
        RecordSource.open(copy, "train")
    with pytest.raises(InputError, match=r"found no dataset_info\.json, expected a prepared data set"):
        RecordSource.open(tmp_path, "train")
    with pytest.raises(InputError, match="got no split 'test', expected one of train"):
        RecordSource.open(target, "test")


def test_a_full_disk_leaves_nothing_in_place(tmp_path, small_shards, monkeypatch, capsys):
    file, images = write_llava(tmp_path, 30)

    class Full(shards.ArrayRecordWriter):
        def close(self):
            super().close()
            raise OSError(28, "No space left on device", "packed")

    monkeypatch.setattr(shards, "ArrayRecordWriter", Full)
    with pytest.raises(SystemExit) as stop:
        prepare.main([str(file), "--images", str(images), "--out", str(tmp_path / "packed"), "--workers", "1"])
    assert stop.value.code == 2
    assert "No space left on device" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / ".packed.partial").iterdir()] == []


def test_a_part_is_held_out_and_no_image_is_on_both_sides(tmp_path, small_shards, capsys):
    file, images = write_llava(tmp_path, 200, n_images=40)
    options = ["--images", str(images), "--held-out", "0.2", "--workers", "2", "--out"]
    prepare.main([str(file), *options, str(tmp_path / "packed")])
    splits = {split: list(RecordSource.open(tmp_path / "packed", split)) for split in ("train", "test")}
    counts = {split: len(records) for split, records in splits.items()}
    assert f"{counts['train']} train records, {counts['test']} test records" in capsys.readouterr().out
    assert 20 < counts["test"] < 70 and sum(counts.values()) == 200
    assert len({record.id for records in splits.values() for record in records}) == 200
    shown = {split: {record.image for record in records} - {None} for split, records in splits.items()}
    assert shown["test"] and not shown["train"] & shown["test"]
    assert any(record.image is None for record in splits["test"])
    with pytest.raises(SystemExit) as stop:
        prepare.main([str(file), *options[:3], "0.0001", "--out", str(tmp_path / "other")])
    assert stop.value.code == 2 and "which leaves none for test" in capsys.readouterr().err
    with pytest.raises(InputError, match="got something else there"):
        pack(Packing((file,), images), tmp_path / "packed", workers=1)


def test_a_shard_may_be_left_without_records(tmp_path, small_shards):
    file, images = write_llava(tmp_path, 40)
    entries = json.loads(file.read_text())
    entries[10:20] = [7] * 10
    entries[3]["conversations"].append({"from": "human", "value": "And?"})
    file.write_text(json.dumps(entries))
    pack(Packing((file,), images, max_bad=0.5), tmp_path / "packed", workers=1)
    records = read(tmp_path / "packed")
    assert [int(record.id[:8]) for record in records] == [*range(10), *range(20, 40)]
    assert [len(record.turns) for record in records] == [
        2
    ] * 30  # what is asked at the end and not answered is left out
