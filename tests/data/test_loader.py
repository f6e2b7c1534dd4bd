"""From builder to batches: everything that was written is read, in an order that only the seed decides."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ml_mamba_jax.config import MLMambaConfig
from ml_mamba_jax.data import builders, scenes
from ml_mamba_jax.data.loader import batches
from ml_mamba_jax.data.source import RecordSource
from ml_mamba_jax.errors import InputError
from ml_mamba_jax.prompt import Turn, render
from ml_mamba_jax.tokenizer import Tokenizer

TINY = MLMambaConfig.named("tiny")
MAX_TOKENS = 128


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return builders.prepare_digits(tmp_path_factory.mktemp("digits"), train_scenes=30, test_scenes=6)


@pytest.fixture(scope="module")
def source(digits) -> RecordSource:
    return RecordSource(digits, "train")


@pytest.fixture(scope="module")
def tokenizer(source) -> Tokenizer:
    return Tokenizer.train((piece.text for record in source for piece in render(record.turns)), 400)


def read(source, tokenizer, **options) -> list:
    options = {"batch_size": 4, "max_tokens": MAX_TOKENS, "seed": 1, "first": 0, "last": 10, **options}
    return list(batches(source, tokenizer, TINY, **options))


def assert_same(left: list, right: list) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_array_equal(a.is_target, b.is_target)
        np.testing.assert_array_equal(a.images["dinov2"], b.images["dinov2"])


def test_records_are_what_the_scenes_say(digits, source):
    assert len(source) == 30
    assert {record.id for record in source} == {f"train-{i:06d}" for i in range(30)}
    held_out = RecordSource(digits, "test")
    asked = {(r.id, r.kind, r.turns[0].text.removeprefix("<image>\n"), r.turns[1].text) for r in held_out}
    loaded = scenes.load_digits()
    members = scenes.split_digits(loaded.labels)["test"]
    expected = {
        (f"test-{i:06d}-{j}", *question)
        for i, scene in enumerate(scenes.scenes(loaded, members, 6, 1))
        for j, question in enumerate(scene.questions)
    }
    assert asked == expected


def test_a_second_preparation_writes_nothing(digits):
    files = {path: path.stat().st_mtime_ns for path in Path(digits.data_dir).rglob("*")}
    assert any(path.name.endswith(".array_record-00000-of-00001") for path in files)
    builders.prepare_digits(Path(digits.data_dir).parents[2], 30, 6)
    assert {path: path.stat().st_mtime_ns for path in Path(digits.data_dir).rglob("*")} == files


def test_an_epoch_has_every_record_once_in_another_order_each_time(source, tokenizer):
    rows = np.concatenate([batch.tokens for batch in read(source, tokenizer, batch_size=5, last=12)])
    first, second = (sorted(map(bytes, half)) for half in (rows[:30], rows[30:]))
    assert first == second
    assert not np.array_equal(rows[:30], rows[30:])


def test_the_order_depends_on_the_seed_alone(source, tokenizer):
    straight = read(source, tokenizer)
    assert_same(read(source, tokenizer), straight)
    assert_same(read(source, tokenizer, workers=2), straight)
    assert_same(read(source, tokenizer, first=6), straight[6:])
    assert_same(read(source, tokenizer, last=7), straight[:7])
    other = read(source, tokenizer, seed=2)
    assert not np.array_equal(other[0].tokens, straight[0].tokens)


def test_every_batch_has_targets_and_pixels(source, tokenizer):
    for batch in read(source, tokenizer):
        assert batch.tokens.shape == (4, MAX_TOKENS)
        assert batch.is_target.any(axis=1).all()
        assert batch.images["siglip"].shape == (4, 32, 32, 3)
        assert batch.image_mask is None


@pytest.fixture
def llava(tmp_path):
    """Three records of one's own: two with images, one of text alone."""
    images = tmp_path / "images"
    images.mkdir()
    for name, colour in (("red.png", "red"), ("blue.jpg", "blue")):
        Image.new("RGB", (30, 20), colour).save(images / name)
    turns = [{"from": "human", "value": "<image>\nWhich colour?"}, {"from": "gpt", "value": "Red"}]
    entries = [
        {"id": "a", "image": "red.png", "conversations": turns},
        {"id": "b", "image": "blue.jpg", "conversations": [turns[0], {"from": "gpt", "value": "Blue"}]},
        {"id": "c", "conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi"}]},
    ]
    return tmp_path, entries


def prepare(tmp_path: Path, entries) -> RecordSource:
    (tmp_path / "chat.json").write_text(json.dumps(entries))
    return RecordSource(builders.prepare_llava(tmp_path / "data", tmp_path / "chat.json", tmp_path / "images"), "train")


def test_a_llava_file_is_packed_with_the_bytes_of_its_images(llava):
    tmp_path, entries = llava
    records = {record.turns[1].text: record for record in prepare(tmp_path, entries)}
    assert records["Red"].image == (tmp_path / "images" / "red.png").read_bytes()
    assert records["Blue"].image == (tmp_path / "images" / "blue.jpg").read_bytes()
    assert records["Hi"].image is None
    assert records["Red"].turns == (Turn("human", "<image>\nWhich colour?"), Turn("gpt", "Red"))
    tokenizer = Tokenizer.train(["Which colour?"], 300)
    (batch,) = batches(
        prepare(tmp_path, entries), tokenizer, TINY, batch_size=3, max_tokens=80, seed=0, first=0, last=1
    )
    assert sorted(batch.image_mask.tolist()) == [False, True, True]


def test_captions_are_read_without_their_questions(llava):
    tmp_path, entries = llava
    source = prepare(tmp_path, entries[:2])
    tokenizer = Tokenizer.train([], 257)
    (batch,) = read(source, tokenizer, batch_size=2, last=1, max_tokens=10, form="caption")
    expected = sorted(tokenizer.encode(f"{colour}<|endoftext|>") for colour in ("Red", "Blue"))
    rows = zip(batch.tokens.tolist(), batch.lengths, strict=True)
    assert sorted(row[:length] for row, length in rows) == expected
    np.testing.assert_array_equal(batch.is_target, np.arange(10) < batch.lengths[:, None])


def test_every_image_file_is_read_once(llava, monkeypatch):
    tmp_path, entries = llava
    read_bytes, files = Path.read_bytes, []
    monkeypatch.setattr(Path, "read_bytes", lambda path: files.append(path.name) or read_bytes(path))
    prepare(tmp_path, entries)
    assert sorted(name for name in files if not name.endswith(".json")) == ["blue.jpg", "red.png"]


def test_all_unusable_records_are_listed_and_nothing_is_left_behind(llava):
    tmp_path, entries = llava
    (tmp_path / "images" / "blue.jpg").write_bytes((tmp_path / "images" / "blue.jpg").read_bytes()[:200])
    entries[0]["image"] = "gone.png"
    entries.append({"id": "d", "conversations": []})
    with pytest.raises(InputError) as caught:
        prepare(tmp_path, entries)
    message = str(caught.value)
    assert "3 of 4 records cannot be used" in message
    for part in (
        "gone.png: found no such image file",
        "blue.jpg: cannot decode",
        "chat.json[3]: conversations: got an empty",
    ):
        assert part in message
    assert not list((tmp_path / "data").rglob("*.array_record*"))


def test_what_is_no_list_of_records_is_refused(llava):
    tmp_path, _ = llava
    with pytest.raises(InputError, match=r"chat\.json: got no list of records"):
        prepare(tmp_path, {"id": 1})
    (tmp_path / "chat.json").write_text("[{")
    with pytest.raises(InputError, match="cannot read the records"):
        builders.prepare_llava(tmp_path / "data", tmp_path / "chat.json", tmp_path)
    with pytest.raises(InputError, match=r"none\.json: found no such file"):
        builders.prepare_llava(tmp_path / "data", tmp_path / "none.json", tmp_path)
