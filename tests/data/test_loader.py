"""From builder to batches: everything that was written is read, in an order that only the seed decides."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from ml_mamba_jax.config import MLMambaConfig
from ml_mamba_jax.data import builders, lengths, loader, scenes
from ml_mamba_jax.data.loader import batches, make_order
from ml_mamba_jax.data.records import Record
from ml_mamba_jax.data.samples import make_sample
from ml_mamba_jax.data.shards import Packing, pack
from ml_mamba_jax.data.source import RecordSource
from ml_mamba_jax.errors import InputError, WorkerError
from ml_mamba_jax.prompt import Turn, render
from ml_mamba_jax.tokenizer import Tokenizer
from tests.data.own_data import write_llava

TINY = MLMambaConfig.named("tiny")
MAX_TOKENS = 128
STARTING = 10  # seconds that workers may take to start on a busy machine


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


def test_all_unusable_records_are_listed_and_no_data_set_is_there(llava):
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
    assert {path.name for path in (tmp_path / "data").rglob("*") if path.is_dir()} == {
        "llava_folder",
        next((tmp_path / "data" / "llava_folder").iterdir()).name,
        ".1.0.0.partial",
    }


def test_what_is_no_list_of_records_is_refused(llava):
    tmp_path, _ = llava
    with pytest.raises(InputError, match=r"chat\.json: got no list of records"):
        prepare(tmp_path, {"id": 1})
    (tmp_path / "chat.json").write_text("[{")
    with pytest.raises(InputError, match="cannot read the records"):
        builders.prepare_llava(tmp_path / "data", tmp_path / "chat.json", tmp_path)
    with pytest.raises(InputError, match=r"none\.json: found no such file"):
        builders.prepare_llava(tmp_path / "data", tmp_path / "none.json", tmp_path)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> RecordSource:
    """Forty records, every fourth text alone, of five lengths."""
    folder = tmp_path_factory.mktemp("mixed")
    file, images = write_llava(folder, 40)
    pack(Packing((file,), images), folder / "packed", workers=1)
    return RecordSource.open(folder / "packed", "train")


def order_of(source, tokenizer, batching: str, batch_size: int = 4, seed: int = 1):
    options = {"batch_size": batch_size, "max_tokens": 64, "seed": seed, "batching": batching, "row_length": 160}
    return make_order(source, tokenizer, TINY, **options)


def read_in_order(source, tokenizer, batching: str, **options) -> list:
    order = order_of(source, tokenizer, batching)
    options = {"batch_size": 4, "max_tokens": 64, "seed": 1, "first": 0, "last": 12, "order": order, **options}
    return list(batches(source, tokenizer, TINY, **options))


def assert_equal(left: list, right: list) -> None:
    assert len(left) == len(right)
    for pair in zip(left, right, strict=True):
        a, b = map(jax.tree.leaves, pair)
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("batching, workers", [("grouped", (1, 2, 4)), ("packed", (2,))])
def test_any_number_of_workers_gives_the_same_batches(mixed, tokenizer, batching, workers):
    expected = read_in_order(mixed, tokenizer, batching)
    for n in workers:
        assert_equal(read_in_order(mixed, tokenizer, batching, workers=n), expected)
    assert_equal(read_in_order(mixed, tokenizer, batching, first=5), expected[5:])


@pytest.mark.parametrize("batching", ["random", "grouped", "packed"])
def test_processes_share_the_rows_of_a_batch(mixed, tokenizer, batching):
    whole = read_in_order(mixed, tokenizer, batching)
    parts = [read_in_order(mixed, tokenizer, batching, part=(i, 2)) for i in range(2)]
    forms = [[jax.tree.structure(batch) for batch in part] for part in parts]
    assert forms[0] == forms[1], "they are put together on the devices"
    together = [
        jax.tree.map(lambda a, b: np.concatenate([a, b]), *(part._replace(image_mask=None) for part in pair))
        for pair in zip(*parts, strict=True)
    ]
    assert_equal(together, [batch._replace(image_mask=None) for batch in whole])
    with pytest.raises(InputError, match="batch_size: got 4, expected a multiple of 3, the number of parts"):
        batches(mixed, tokenizer, TINY, batch_size=4, max_tokens=64, seed=1, first=0, last=1, part=(0, 3))


@pytest.mark.parametrize("batching", ["random", "grouped", "packed"])
def test_each_process_reads_its_records_alone(mixed, tokenizer, batching, monkeypatch):
    read, take = set(), RecordSource.__getitem__
    monkeypatch.setattr(RecordSource, "__getitem__", lambda self, index: read.add(index) or take(self, index))
    order = order_of(mixed, tokenizer, batching)
    rows = order.batch(0).rows
    halves = [{number for row in half for number in row} for half in (rows[: len(rows) // 2], rows[len(rows) // 2 :])]
    assert not halves[0] & halves[1]
    for i, half in enumerate(halves):
        load = loader._Load(mixed, tokenizer, TINY, order, 64, "chat", False, (i, 2))
        read.clear()  # of what checking the types has looked at
        load(0)
        assert read == half


def test_grouped_and_packed_rows_hold_the_samples_they_should(mixed, tokenizer):
    """Each record of an epoch is in one row, with its own tokens, targets and pixels."""
    samples = [make_sample(record, tokenizer, TINY, 64) for record in mixed]
    expected = sorted((s.tokens.tobytes(), s.is_target.tobytes(), s.pixels is not None) for s in samples)
    found = []
    grouped = order_of(mixed, tokenizer, "grouped")
    for batch in read_in_order(mixed, tokenizer, "grouped", last=grouped.n_batches(1)):
        for row, n in enumerate(batch.lengths):
            if n:
                has_image = "siglip" in batch.images
                found.append((batch.tokens[row, :n].tobytes(), batch.is_target[row, :n].tobytes(), has_image))
            else:
                assert not batch.is_target[row].any()
        assert batch.image_mask is None
    assert sorted(found) == expected

    found = []
    packed = order_of(mixed, tokenizer, "packed")
    for batch in read_in_order(mixed, tokenizer, "packed", last=packed.n_batches(1)):
        for row in range(4):
            starts = set(batch.image_starts[row][batch.image_starts[row] >= 0].tolist())
            for segment in range(batch.segment_ids[row].max() + 1):
                (at,) = np.nonzero(batch.segment_ids[row] == segment)
                has_image = int(at[0]) in starts
                text = at[TINY.n_visual_tokens * has_image :]
                found.append((batch.tokens[row, text].tobytes(), batch.is_target[row, text].tobytes(), has_image))
    assert sorted(found) == expected


def test_a_run_compiles_a_handful_of_times(mixed, tokenizer):
    """Three epochs of batches of many lengths, with and without images, are few shapes; a packed run has one."""
    for batching, at_most in (("random", 2), ("grouped", 6), ("packed", 1)):
        order = order_of(mixed, tokenizer, batching)
        traces = []
        step = jax.jit(lambda batch, traces=traces: traces.append(1) or batch.tokens.sum())
        for batch in read_in_order(mixed, tokenizer, batching, last=order.n_batches(3)):
            step(batch)
        assert 1 <= len(traces) <= at_most, batching
        assert step._cache_size() == len(traces)
    assert {batch.tokens.shape[1] for batch in read_in_order(mixed, tokenizer, "grouped", last=40)} == {32, 64}


def test_lengths_are_counted_once(mixed, tokenizer, monkeypatch):
    first = lengths.measure(mixed, tokenizer, "zephyr")
    expected = [len(make_sample(record, tokenizer, TINY, 10_000).tokens) for record in mixed]
    assert first.tokens.tolist() == expected
    assert first.has_image.tolist() == [record.image is not None for record in mixed]
    monkeypatch.setattr(lengths, "_measure", lambda *_: pytest.fail("counted again"))
    again = lengths.measure(mixed, tokenizer, "zephyr")
    np.testing.assert_array_equal(again.tokens, first.tokens)
    monkeypatch.undo()
    other = lengths.measure(mixed, Tokenizer.train([], 257), "zephyr")
    assert (other.tokens > first.tokens).all()


class WithBadImages(RecordSource):
    """A source in which the images of some records are cut off."""

    def __init__(self, source: RecordSource, bad: set[int]):
        vars(self).update(vars(source))
        self.bad = bad

    def __getitem__(self, index: int) -> Record:
        record = super().__getitem__(index)
        return record._replace(image=record.image[:60]) if index in self.bad else record


@pytest.mark.parametrize("batching", ["random", "grouped", "packed"])
def test_a_bad_image_is_an_error_or_is_skipped_and_counted(mixed, tokenizer, batching, capsys):
    bad = {9, 17}  # both have images
    spoilt = WithBadImages(mixed, bad)
    order = order_of(mixed, tokenizer, batching)
    options = {"batch_size": 4, "max_tokens": 64, "seed": 1, "first": 0, "last": order.n_batches(2), "order": order}
    with pytest.raises(InputError, match=r"000000(09-9|17-17): cannot decode the image"):
        list(batches(spoilt, tokenizer, TINY, **options))

    stream = batches(spoilt, tokenizer, TINY, **options, max_bad=0.05)
    seen, read = [], []
    for batch in stream:
        seen += stream.ids
        read.append(batch)
    assert set(stream.skipped) == {"00000009-9", "00000017-17"}
    assert capsys.readouterr().err.count("skipped, number") == 2
    assert sorted(set(seen)) == sorted(record.id for i, record in enumerate(mixed) if i not in bad)
    clean = list(batches(mixed, tokenizer, TINY, **options))
    shapes = [jax.tree.map(np.shape, pair) for pair in zip(read, clean, strict=True)]
    assert all(left == right for left, right in shapes)
    targets = [sum(int(batch.is_target.sum()) for batch in some) for some in (read, clean)]
    assert targets[0] < targets[1]

    with pytest.raises(InputError, match="got 2 of 40 records that cannot be used, expected at most 1; mend them"):
        list(batches(spoilt, tokenizer, TINY, **options, max_bad=0.025))

    # Those of before a restart count, and a record that was among them counts once.
    for before, fits in ({"00000009-9": "bad"}, True), ({"another": "bad"}, False):
        stream = batches(spoilt, tokenizer, TINY, **options, max_bad=0.05, skipped=before)
        if fits:
            assert len(list(stream)) == len(read)
        else:
            with pytest.raises(InputError, match="got 3 of 40 records that cannot be used, expected at most 2"):
                list(stream)


def test_the_ids_of_a_batch_and_the_wait_for_it_are_told(mixed, tokenizer):
    order = order_of(mixed, tokenizer, "grouped")
    stream = batches(mixed, tokenizer, TINY, batch_size=4, max_tokens=64, seed=1, first=0, last=10, order=order)
    for number, batch in enumerate(stream):
        expected = [mixed[row[0]].id for row in order.batch(number).rows if row]
        assert stream.ids == expected and len(batch.lengths) == 4
        assert stream.waited >= 0
    slow = batches(Slow(mixed), tokenizer, TINY, batch_size=4, max_tokens=64, seed=1, first=0, last=2)
    next(slow)
    assert slow.waited > 0.3
    slow.close()
    with pytest.raises(StopIteration):
        next(slow)


class Slow(RecordSource):
    def __init__(self, source: RecordSource, seconds: float = 0.1):
        vars(self).update(vars(source))
        self.seconds = seconds

    def __getitem__(self, index: int) -> Record:
        time.sleep(self.seconds)
        return super().__getitem__(index)


def test_data_that_do_not_come_are_an_error(mixed, tokenizer, monkeypatch):
    monkeypatch.setattr(loader, "STALLED_AFTER", 0.6)
    monkeypatch.setattr(loader, "CLOSING", 0.1)
    stream = batches(Slow(mixed, 3.0), tokenizer, TINY, batch_size=2, max_tokens=64, first=0, last=9)
    with pytest.raises(WorkerError, match=r"data: got no batch for 1 s after .*; see whether the storage answers"):
        next(stream)


def test_a_worker_that_is_killed_or_raises_ends_the_stream_within_ten_seconds(mixed, tokenizer):
    options = {"batch_size": 4, "max_tokens": 64, "seed": 1, "first": 0, "workers": 2}
    stream = batches(mixed, tokenizer, TINY, last=10_000, **options)
    next(stream)
    (victim, *_) = multiprocessing.active_children()
    os.kill(victim.pid, signal.SIGKILL)
    started = time.perf_counter()
    with pytest.raises(WorkerError, match=f"data: worker process {victim.pid} was killed by SIGKILL; resume the run"):
        for _ in stream:
            assert time.perf_counter() - started < 10
    assert time.perf_counter() - started < 10

    started = time.perf_counter()
    with pytest.raises(InputError, match="00000009-9: cannot decode the image"):
        for _ in batches(WithBadImages(mixed, {9}), tokenizer, TINY, last=100, **options):
            pass
    assert time.perf_counter() - started < 10 + STARTING
    assert not multiprocessing.active_children()


LEFT_EARLY = """
import multiprocessing, os, re, signal, sys
from pathlib import Path
from ml_mamba_jax.config import MLMambaConfig
from ml_mamba_jax.data.loader import batches
from ml_mamba_jax.data.source import RecordSource
from ml_mamba_jax.errors import WorkerError
from ml_mamba_jax.tokenizer import Tokenizer

if __name__ == "__main__":
    source, tokenizer = RecordSource.open(Path(sys.argv[1]), "train"), Tokenizer.train([], 257)
    config = MLMambaConfig.named("tiny")
    options = dict(batch_size=64, max_tokens=200, seed=1, first=0, last=10_000, workers=2)
    stream = batches(source, tokenizer, config, **options)
    next(stream)
    if sys.argv[2] == "close":
        stream.close()
    else:
        children = multiprocessing.active_children()
        for pid in [os.getpid(), *(child.pid for child in children)]:
            print(*re.findall("/dev/shm/psm_\\\\w+", Path(f"/proc/{pid}/maps").read_text()))
        os.kill(children[0].pid, signal.SIGKILL)
        try:
            for _ in stream: pass
        except WorkerError:
            print("told")
    assert not multiprocessing.active_children()
"""


@pytest.mark.parametrize("end", ["close", "kill"])
def test_a_stream_that_ends_early_leaves_no_process_and_no_shared_memory(mixed, tmp_path, end):
    (tmp_path / "program.py").write_text(LEFT_EARLY)
    command = [sys.executable, tmp_path / "program.py", mixed.folder, end]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    if end == "close":
        assert not done.stderr
    else:  # what the dead worker had not handed over is freed when Python ends
        *memory, told = done.stdout.split()
        assert told == "told" and memory
        assert not [path for path in memory if Path(path).exists()]
