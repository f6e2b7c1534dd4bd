"""Records as people keep them: json files in LLaVA's form, or jsonl files of one's own, beside a folder of images.

A `.json` file holds one list, a `.jsonl` file one object a line. What an object may say:

    {"id": "1", "image": "coco/1.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"}, ...]}
    {"image": "1.jpg", "question": "What is this?", "answer": "A cat."}
    {"image": "1.jpg", "caption": "A cat on a table."}

`image` is relative to the folder of images; without it the record is text alone. `file_name` may stand for it. Files are read
piece by piece, so their size does not matter.
"""

import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from ml_mamba_jax.data.records import parse_conversation
from ml_mamba_jax.errors import InputError
from ml_mamba_jax.prompt import IMAGE_MARK, Turn

METADATA_FILE = "metadata.jsonl"
"""What a folder that is given in place of a file has to hold."""
PIECE = 1 << 22


class Entry(NamedTuple):
    """One object of a file. `name` says in errors where it stands; a broken line has the error as its `value`."""

    name: str
    value: Any


class Description(NamedTuple):
    """A record whose image still lies in its file: `image` is the path in the folder of images, or None."""

    id: str
    image: str | None
    turns: tuple[Turn, ...]


def json_file(path: Path) -> Path:
    """The file of records that `path` means: itself, or the `metadata.jsonl` of a folder."""
    if path.is_dir():
        path = path / METADATA_FILE
    if not path.is_file():
        raise InputError(
            f"{path}: found no such file, expected a json list or a jsonl file of records, or a folder with {METADATA_FILE}"
        )
    return path


def read_entries(path: Path) -> Iterator[Entry]:
    """The objects of a file in order.

    Raises:
        InputError: the file cannot be read, is no list, or is broken from some object on; says where.
    """
    try:
        if path.suffix == ".jsonl":
            yield from _read_lines(path)
        else:
            yield from _read_list(path)
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: got bytes that are not UTF-8 ({error.reason}), expected a text file") from error
    except OSError as error:
        raise InputError(f"{path}: cannot read the records: {error.strerror}") from error


def _read_lines(path: Path) -> Iterator[Entry]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                name = f"{path.name}:{number}"
                try:
                    yield Entry(name, json.loads(line))
                except (ValueError, RecursionError) as error:
                    yield Entry(name, InputError(f"{name}: cannot be read as JSON: {error}"))


def _read_list(path: Path) -> Iterator[Entry]:
    """Decode the objects of a list one by one, with no more than a piece of the text in memory."""
    decoder = json.JSONDecoder()
    with path.open(encoding="utf-8-sig") as file:
        text = _Text(file)
        if text.next_character() != "[":
            raise InputError(f"{path}: got no list of records, expected the LLaVA form (a list of objects)")
        text.skip()
        number, closed = 0, text.next_character() == "]"
        while not closed:
            try:
                value = text.decode(decoder)
            except (ValueError, RecursionError) as error:
                at = text.dropped + getattr(error, "pos", text.at)
                raise _broken(path, number, at, str(getattr(error, "msg", error))) from error
            yield Entry(f"{path.name}[{number}]", value)
            number, character = number + 1, text.next_character()
            if character not in (",", "]"):
                raise _broken(path, number, text.dropped + text.at, "expected a comma or the end of the list")
            closed = character == "]"
            if not closed:
                text.skip()
                text.next_character()
        text.skip()
        if text.next_character():
            raise _broken(path, number, text.dropped + text.at, "got more text after the list")


def _broken(path: Path, number: int, character: int, problem: str) -> InputError:
    return InputError(f"{path}: cannot read the records: broken at record {number}, character {character}: {problem}")


class _Text:
    """A window on a text file: `kept` is what was read and is still needed, `at` where we are in it; `dropped` characters
    stood before."""

    def __init__(self, file: io.TextIOBase):
        self._file = file
        self.kept, self.at, self.dropped = "", 0, 0

    def read(self) -> bool:
        """Keep more: as much again as there is left. False at the end of the file."""
        rest = self.kept[self.at :]
        more = self._file.read(max(PIECE, len(rest)))
        if more:
            self.dropped += self.at
            self.kept, self.at = rest + more, 0
        return bool(more)

    def decode(self, decoder: json.JSONDecoder):
        """The value that starts at `at`, which then stands behind it. Raises ValueError or RecursionError."""
        while True:
            try:
                value, end = decoder.raw_decode(self.kept, self.at)
            except ValueError:
                if not self.read():
                    raise
                continue
            cut = self.kept[end - 1].isdigit() and self.kept[end : end + 1] not in (",", "]")  # a number may go on
            if not cut or not self.read():
                self.at = end
                return value

    def skip(self) -> None:
        self.at += 1

    def next_character(self) -> str:
        """The next character that is no white space, where `at` then stands; empty at the end."""
        while True:
            while self.at < len(self.kept):
                if self.kept[self.at] not in " \t\r\n":
                    return self.kept[self.at]
                self.at += 1
            if not self.read():
                return ""


def describe(entry: Entry) -> Description:
    """Check an object and say what its record is; the image is not looked at.

    Raises:
        InputError: names the record and the field.
    """
    name, value = entry
    if isinstance(value, InputError):
        raise value
    if not isinstance(value, dict):
        raise InputError(f"{name}: got {type(value).__name__}, expected an object")
    image = _image(value, name)
    own_id = value.get("id", "")
    if isinstance(own_id, bool) or not isinstance(own_id, str | int):
        raise InputError(f"{name}: id: got {type(own_id).__name__}, expected text or a number")
    description = Description(str(own_id), image, _turns(value, name, image is not None))
    for text in (description.id, image or "", *(turn.text for turn in description.turns)):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            around = text[max(error.start - 10, 0) : error.start + 10]
            raise InputError(f"{name}: got half of a pair of characters in {around!r}, expected whole ones") from error
    return description


def _image(value: dict, name: str) -> str | None:
    field = "image" if "image" in value else "file_name"
    image = value.get(field)
    if isinstance(image, list):
        if len(image) != 1:
            raise InputError(f"{name}: {field}: got a list of {len(image)}, expected one path: a record has one image")
        (image,) = image
    if image is None:
        return None
    if not isinstance(image, str):
        raise InputError(f"{name}: {field}: got {type(image).__name__}, expected a path")
    path = PurePosixPath(image)
    if not image or "\0" in image or path.is_absolute() or ".." in path.parts:
        raise InputError(f"{name}: {field}: got {image!r}, expected a path inside the folder of images")
    return image


def _turns(value: dict, name: str, has_image: bool) -> tuple[Turn, ...]:
    forms = [form for form in ("conversations", "question", "caption") if form in value]
    if len(forms) > 1:
        raise InputError(f"{name}: got {' and '.join(forms)}, expected only one of them")
    if forms in (["question"], ["caption"]):
        fields = ("question", "answer") if forms == ["question"] else ("caption",)
        for field in fields:
            if not isinstance(value.get(field), str):
                got = type(value[field]).__name__ if field in value else "nothing"
                raise InputError(f"{name}: {field}: got {got}, expected text")
        question = value["question"] if forms == ["question"] else ""
        mark = f"{IMAGE_MARK}\n" if has_image and IMAGE_MARK not in question else ""
        return Turn("human", mark + question), Turn("gpt", value[fields[-1]])
    return parse_conversation(value.get("conversations"), name)


def image_folder_of(files: Sequence[Path], image_folder: Path | None) -> Path:
    """The folder of images: as given, or that of the first file. Raises InputError where it is none."""
    folder = files[0].parent if image_folder is None else image_folder
    if not folder.is_dir():
        raise InputError(f"{folder}: found no such folder, expected the one that image paths are relative to")
    return folder
