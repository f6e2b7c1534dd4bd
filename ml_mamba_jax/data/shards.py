"""Records written to array_record shards: by several processes, whole or not at all, and without starting over after a kill.

Shards are written into a folder aside, each under a name of its own until it is whole, with a note beside it that says what it was
made of. A second attempt keeps the shards whose notes still hold. When all are there, the folder is renamed to its place. There it
is a data set of `tensorflow_datasets`.
"""

import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter

from ml_mamba_jax.data.llava import Description, Entry, describe, read_entries
from ml_mamba_jax.data.parallel import spread
from ml_mamba_jax.data.progress import progress
from ml_mamba_jax.data.records import Record
from ml_mamba_jax.errors import InputError
from ml_mamba_jax.image import check_image, read_file

NAME, VERSION = "llava_folder", "1.0.0"
TRAIN, TEST = "train", "test"
RECORDS_PER_SHARD = 1024
WRITER_OPTIONS = "group_size:1,uncompressed"  # each record can be read alone; images are compressed already
CONTENTS_FILE = "contents.json"
LEFT_OUT_FILE = "left_out.txt"
SHOWN = 50
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")


def record_features() -> tfds.features.FeaturesDict:
    """What a record looks like on disk. Images are the bytes of their files, empty for text alone."""
    turn = {"from": tfds.features.Text(), "value": tfds.features.Text()}
    return tfds.features.FeaturesDict(
        {
            "id": tfds.features.Text(),
            "image": tfds.features.Text(),
            "conversations": tfds.features.Sequence(turn),
            "kind": tfds.features.Text(),
        }
    )


def example(record: Record) -> dict:
    """A record in the form of `record_features`."""
    return {
        "id": record.id,
        "image": record.image or b"",
        "conversations": [{"from": turn.role, "value": turn.text} for turn in record.turns],
        "kind": record.kind,
    }


@dataclass(frozen=True)
class Packing:
    """What to pack, and what to do with records that cannot be used.

    `max_bad`: the part of the records that may be left out; 0 refuses the first. `any_suffix`: an image that is missing may have
    another ending, as `x.gif` for `x.jpg`. `held_out`: the part of the images that the test split has, with all their records,
    and of the records without one.
    """

    files: tuple[Path, ...]
    image_folder: Path
    max_bad: float = 0.0
    any_suffix: bool = False
    held_out: float = 0.0


class Numbered(NamedTuple):
    """An object and its number in the data set."""

    number: int
    entry: Entry


class ShardTask(NamedTuple):
    """One shard to write."""

    path: Path
    split: str
    entries: list[Numbered]
    packing: Packing
    digest: str

    def __str__(self) -> str:
        return f"{self.path.name} (from {self.entries[0].entry.name} on)"


class ShardNote(NamedTuple):
    """What is kept about a shard. `digest` is of what it was made of, `problems` are the records left out."""

    name: str
    split: str
    digest: str
    read: int
    records: int
    record_bytes: int
    file_bytes: int
    problems: list[str]


def pack(packing: Packing, target: Path, workers: int) -> None:
    """Write the records to the folder `target`, unless they are there already.

    Raises:
        InputError: records that cannot be used, one line for each; unreadable files; another data set in that place.
        WorkerError: a worker process died.
    """
    if target.exists():
        _check_same(packing, target)
        return
    aside = target.with_name(f".{target.name}.partial")
    aside.mkdir(parents=True, exist_ok=True)
    with _alone(aside):
        if target.exists():  # another process was faster
            with contextlib.suppress(OSError):
                aside.rmdir()
            _check_same(packing, target)
            return
        counts = _count(packing)
        notes = _write_shards(packing, aside, counts, workers)
        _refuse_bad(packing, [problem for note in notes for problem in note.problems], sum(counts.values()))
        _describe_whole(packing, aside, notes)
        _sync(aside)
        aside.rename(target)
        _sync(target.parent)


def source_digest(packing: Packing) -> str:
    """Names what is packed: the contents of the files of records, and the folder of images."""
    digest = hashlib.sha256()
    for path in packing.files:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    digest.update(str(packing.image_folder.resolve()).encode())
    if packing.held_out:
        digest.update(f"held out {packing.held_out}".encode())
    return digest.hexdigest()[:12]


def check_contents(folder: Path) -> None:
    """Raise InputError where shards of a packed data set are missing or not as long as they were written."""
    path = folder / CONTENTS_FILE
    if not path.is_file():
        return  # written by tfds itself
    for name, size in _read_contents(path)["sizes"].items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else None
        if found != size:
            got = "no such file" if found is None else f"{found} bytes"
            raise InputError(f"{folder / name}: got {got}, expected {size} bytes; copy or prepare the data set again")


def _read_contents(path: Path) -> dict:
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
        return {"source": str(contents["source"]), "sizes": dict(contents["sizes"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: is damaged ({error!r:.100}); copy or prepare the data set again") from error


def _write_shards(packing: Packing, aside: Path, counts: dict[str, int], workers: int) -> list[ShardNote]:
    notes: list[ShardNote] = []
    expected = set()

    def tasks() -> Iterator[ShardTask]:
        """The shards that are not there yet. The others are counted as they are passed."""
        for split, count in counts.items():
            entries, n_shards = _entries(packing, split), -(-count // RECORDS_PER_SHARD)
            for number in range(n_shards):
                some = list(itertools.islice(entries, RECORDS_PER_SHARD))
                path = aside / f"{NAME}-{split}.array_record-{number:05d}-of-{n_shards:05d}"
                expected.update((path.name, _note_path(path).name))
                task = ShardTask(path, split, some, packing, _digest(some, packing))
                if note := _read_note(task):
                    notes.append(note)
                    update(note.read)
                else:
                    yield task

    with progress("packing", sum(counts.values())) as update:
        n_shards = sum(-(-count // RECORDS_PER_SHARD) for count in counts.values())
        for note in spread(write_shard, tasks(), min(workers, n_shards)):
            notes.append(note)
            update(note.read)
    for path in aside.iterdir():  # of an attempt with other records
        if path.name not in expected:
            path.unlink()
    return sorted(notes)


def write_shard(task: ShardTask) -> ShardNote:
    """Write one shard, without the records that cannot be used, and its note."""
    features = record_features()
    serializer = tfds.core.example_serializer.ExampleSerializer(features.get_serialized_info())
    unfinished = task.path.with_name(f".{task.path.name}.{os.getpid()}")
    problems, records, record_bytes = [], 0, 0
    writer = ArrayRecordWriter(str(unfinished), WRITER_OPTIONS)
    try:
        for number, entry in task.entries:
            try:
                record = _load(describe(entry), entry.name, number, task.packing)
            except InputError as error:
                problems.append(str(error))
                continue
            serialized = serializer.serialize_example(features.encode_example(example(record)))
            writer.write(serialized)
            records, record_bytes = records + 1, record_bytes + len(serialized)
        writer.close()
        _sync(unfinished)
        note = ShardNote(
            task.path.name,
            task.split,
            task.digest,
            len(task.entries),
            records,
            record_bytes,
            unfinished.stat().st_size,
            problems,
        )
        unfinished.replace(task.path)
        _write_synced(_note_path(task.path), json.dumps(note._asdict()))
    finally:
        unfinished.unlink(missing_ok=True)
    return note


def image_path(folder: Path, image: str, any_suffix: bool, name: str) -> Path:
    """Where the image of a record lies. Raises InputError, naming what lies there under another ending, if nothing does."""
    path = folder / image
    try:
        if path.is_file():
            return path
        found = path.parent.glob(f"{_escaped(path.stem)}.*") if path.parent.is_dir() else ()
        others = sorted(p for p in found if p.suffix.lower() in SUFFIXES and p.is_file())
    except OSError as error:  # a name that is too long
        raise InputError(f"{name}: image: got {image[:80]!r}: {error.strerror}") from error
    if others and any_suffix:
        return others[0]
    hint = f"; there is {others[0].name}: pass --any-suffix to take it" if others else ""
    raise InputError(f"{name}: {path}: found no such image file{hint}")


def _escaped(stem: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in stem)


def _load(description: Description, name: str, number: int, packing: Packing) -> Record:
    image = None
    if description.image is not None:
        path = image_path(packing.image_folder, description.image, packing.any_suffix, name)
        image = read_file(path)
        check_image(image, f"{name}: {path}")
    answered = description.turns[: len(description.turns) // 2 * 2]  # from a question at the end nothing is learnt
    return Record(f"{number:08d}-{description.id}", image, answered)


def _entries(packing: Packing, split: str | None = None) -> Iterator[Numbered]:
    """The objects of a split, or all of them."""
    for number, entry in enumerate(itertools.chain.from_iterable(map(read_entries, packing.files))):
        if split in (None, _split_of(number, entry, packing)):
            yield Numbered(number, entry)


def _split_of(number: int, entry: Entry, packing: Packing) -> str:
    """Train or test, by the name of the image, so that no image is in both; by the number of a record without one."""
    if not packing.held_out:
        return TRAIN
    value = entry.value if isinstance(entry.value, dict) else {}
    image = value.get("image", value.get("file_name"))
    key = str(number) if image is None else json.dumps(image)
    return TEST if zlib.crc32(key.encode()) < packing.held_out * 2**32 else TRAIN


def _count(packing: Packing) -> dict[str, int]:
    """How many objects each split has."""
    for path in packing.files:
        if next(read_entries(path), None) is None:
            raise InputError(f"{path}: got no records, expected at least one")
    counts = Counter(_split_of(*numbered, packing) for numbered in _entries(packing))
    for split in (TRAIN, TEST) if packing.held_out else (TRAIN,):
        if not counts[split]:
            raise InputError(
                f"held out: got {packing.held_out} of {sum(counts.values())} records, which leaves none for {split}; "
                "choose another part"
            )
    return dict(counts)


def _digest(entries: list[Numbered], packing: Packing) -> str:
    values = ((number, entry.value) for number, entry in entries)
    text = json.dumps([(number, str(value) if isinstance(value, InputError) else value) for number, value in values])
    how = f"{packing.image_folder.resolve()} {packing.any_suffix}"
    return hashlib.sha256((text + how).encode()).hexdigest()


def _note_path(shard: Path) -> Path:
    return shard.with_name(f"{shard.name}.json")


def _read_note(task: ShardTask) -> ShardNote | None:
    """The note of a shard that is whole and made of the same records; if it leaves some out, of one where that may be."""
    try:
        note = ShardNote(**json.loads(_note_path(task.path).read_text(encoding="utf-8")))
        same = note.digest == task.digest and note.file_bytes == task.path.stat().st_size
    except (OSError, ValueError, TypeError):
        return None
    return note if same and (task.packing.max_bad or not note.problems) else None


def _refuse_bad(packing: Packing, problems: list[str], total: int) -> None:
    if len(problems) <= packing.max_bad * total:
        return
    shown = "\n  ".join(problems[:SHOWN])
    more = f"\n  ... and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
    allowed = f", more than the {packing.max_bad:.2%} that may be left out" if packing.max_bad else ""
    files = ", ".join(map(str, packing.files))
    raise InputError(
        f"{files}: {len(problems)} of {total} records cannot be used{allowed}; mend or remove them, or leave them out with "
        f"--max-bad {len(problems) / total:.2g}; python -m ml_mamba_jax.data.check lists them all:\n  {shown}{more}"
    )


def _describe_whole(packing: Packing, aside: Path, notes: list[ShardNote]) -> None:
    """Write what makes shards a data set, and remove what was only of use on the way."""
    identity = tfds.core.dataset_info.DatasetIdentity(
        name=NAME, version=tfds.core.Version(VERSION), data_dir=str(aside), module_name=__name__
    )
    info = tfds.core.DatasetInfo(builder=identity, description="Records in LLaVA's form.", features=record_features())
    info.set_file_format("array_record", override=True)
    splits = []
    for split in sorted({note.split for note in notes}, reverse=True):
        of_split = [note for note in notes if note.split == split]
        template = tfds.core.ShardedFileTemplate(
            dataset_name=NAME, data_dir=aside, split=split, filetype_suffix="array_record"
        )
        splits.append(
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=[note.records for note in of_split],
                num_bytes=sum(note.record_bytes for note in of_split),
                filename_template=template,
            )
        )
    info.set_splits(tfds.core.splits.SplitDict(splits))
    info.write_to_directory(aside)
    sizes = {note.name: note.file_bytes for note in notes}
    contents = {"source": source_digest(packing), "max_bad": packing.max_bad, "sizes": sizes}
    _write_synced(aside / CONTENTS_FILE, json.dumps(contents, indent=1) + "\n")
    if problems := [problem for note in notes for problem in note.problems]:
        _write_synced(aside / LEFT_OUT_FILE, "\n".join(problems) + "\n")
    for note in notes:
        _note_path(aside / note.name).unlink()


def _check_same(packing: Packing, target: Path) -> None:
    path = target / CONTENTS_FILE
    if not path.is_file() or _read_contents(path)["source"] != source_digest(packing):
        raise InputError(
            f"{target}: got something else there, expected a data set of these records; choose another place"
        )
    check_contents(target)


def _write_synced(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(text, encoding="utf-8")
    _sync(aside)
    aside.replace(path)


def _sync(path: Path) -> None:
    """Wait until a file or the names in a folder are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait until no other process writes into the folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{folder}: waiting for another process that writes there ...", flush=True)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
