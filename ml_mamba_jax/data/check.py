"""Look for everything that is wrong with a data set: python -m ml_mamba_jax.data.check FILE ... [--images DIR] [--tokenizer T]

FILE is what ml_mamba_jax.data.prepare takes, or a folder that it wrote. One pass lists all records that are malformed, whose image
is missing, cut off or not to be read, and that have nothing left to learn within --max-tokens; then some samples are shown, what
is not learnt in grey. The exit code is 0 for a clean data set, 2 for others. Images are read at both ends; --decode decodes them.
"""

import argparse
import functools
import itertools
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from ml_mamba_jax.config import MLMambaConfig
from ml_mamba_jax.data import llava, show
from ml_mamba_jax.data.llava import Entry, describe
from ml_mamba_jax.data.parallel import default_workers, spread
from ml_mamba_jax.data.progress import progress
from ml_mamba_jax.data.records import Record
from ml_mamba_jax.data.samples import Form, check_form, has_target
from ml_mamba_jax.data.shards import TRAIN, image_path
from ml_mamba_jax.data.source import RecordSource, splits_of
from ml_mamba_jax.errors import InputError, one_line_errors
from ml_mamba_jax.image import check_image, check_image_ends, read_file
from ml_mamba_jax.prompt import IMAGE_MARK, render
from ml_mamba_jax.tokenizer import Tokenizer

RECORDS_PER_TASK = 1000
MEASURED_PER_TASK = 20
"""Records whose tokens are counted, for an idea of their lengths."""

MALFORMED, IMAGE, MASKED, NOTE = "malformed", "image", "nothing to learn", "note"
TITLES = {
    MALFORMED: "malformed records",
    IMAGE: "images that are missing or cannot be read",
    MASKED: "records with nothing to learn",
    NOTE: "to look at, though they can be used",
}


class Checking(NamedTuple):
    """How to check. `images`: what image paths are relative to, or the prepared data set that holds them."""

    images: Path
    any_suffix: bool
    decode: bool
    tokenizer: str | None
    max_tokens: int
    prompt_format: str
    form: Form
    shown: int


class Task(NamedTuple):
    """Some records to check: objects of a file, or the numbers of records of a prepared data set."""

    items: list[Entry] | range
    checking: Checking
    split: str = TRAIN

    def __str__(self) -> str:
        return f"records from {self.items[0].name if isinstance(self.items, list) else self.items[0]} on"


class Sample(NamedTuple):
    """A record that is good, without its image, and where that is: a file, or the number of the record in a split."""

    record: Record
    image: Path | tuple[int, str] | None


class Found(NamedTuple):
    """What a task found. `problems`: kind and message; `lengths`: tokens of some records; `samples`: some that are good."""

    records: int
    with_image: int
    problems: list[tuple[str, str]]
    lengths: list[int]
    samples: list[Sample]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m ml_mamba_jax.data.check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument(
        "--images", type=Path, metavar="DIR", help="what image paths are relative to (default: beside FILE)"
    )
    parser.add_argument("--any-suffix", action="store_true", help="take x.png or x.gif where x.jpg is missing")
    parser.add_argument("--decode", action="store_true", help="decode every image")
    parser.add_argument(
        "--tokenizer", help="a tokenizer.json, its folder or a hub id: to count tokens, and see what is learnt"
    )
    parser.add_argument("--max-tokens", type=int, default=2048, help="text tokens of a row (default: %(default)s)")
    parser.add_argument(
        "--form", choices=("chat", "caption"), default="chat", help="what is learnt (default: %(default)s)"
    )
    parser.add_argument(
        "--model", default="ml-mamba-3b", help="whose prompt format and pixels are shown (default: %(default)s)"
    )
    parser.add_argument("--show", type=int, default=5, metavar="N", help="samples to show (default: %(default)s)")
    parser.add_argument(
        "--html", type=Path, metavar="PAGE", help="also write the samples, with their images, to a page"
    )
    parser.add_argument(
        "--workers", type=int, default=default_workers(), help="processes (default: %(default)s, the cores)"
    )
    args = parser.parse_args(arguments)
    with one_line_errors():
        sys.exit(check(args))


def check(args: argparse.Namespace) -> int:
    """Check, report on stdout, and return the exit code."""
    config = MLMambaConfig.named(args.model)
    if args.tokenizer:
        Tokenizer.from_pretrained(args.tokenizer).end_id(config.prompt_format)  # only for its checks
    prepared = [folder for folder in args.files if (folder / "dataset_info.json").is_file()]
    if prepared and len(args.files) > 1:
        raise InputError(f"{prepared[0]}: got a prepared data set among {len(args.files)} arguments, expected it alone")
    files = () if prepared else tuple(map(llava.json_file, args.files))
    checking = Checking(
        images=prepared[0] if prepared else llava.image_folder_of(files, args.images),
        any_suffix=args.any_suffix,
        decode=args.decode,
        tokenizer=args.tokenizer,
        max_tokens=args.max_tokens,
        prompt_format=config.prompt_format,
        form=args.form,
        shown=args.show,
    )
    found = _merge(_spread(_prepared_tasks(checking) if prepared else _file_tasks(files, checking), args.workers))
    clean = _report(found, checking)
    _show(_pick(found.samples, args.show, checking.images), checking, config, args.html)
    return 0 if clean else InputError.exit_code


def _file_tasks(files: Sequence[Path], checking: Checking) -> Iterator[Task]:
    entries = itertools.chain.from_iterable(map(_until_broken, files))
    while some := list(itertools.islice(entries, RECORDS_PER_TASK)):
        yield Task(some, checking)


def _until_broken(path: Path) -> Iterator[Entry]:
    """The objects of a file; what breaks the file is the last of them."""
    try:
        yield from llava.read_entries(path)
    except InputError as error:
        yield Entry(path.name, error)


def _prepared_tasks(checking: Checking) -> Iterator[Task]:
    for split in splits_of(checking.images):
        total = len(_source(checking.images, split))
        for start in range(0, total, RECORDS_PER_TASK):
            yield Task(range(start, min(start + RECORDS_PER_TASK, total)), checking, split)


def _spread(tasks: Iterable[Task], workers: int) -> Iterator[Found]:
    with progress("checking", None) as update:
        for found in spread(check_some, tasks, workers):
            update(found.records)
            yield found


def check_some(task: Task) -> Found:
    """Check the records of a task."""
    checking, problems, samples, lengths, with_image = task.checking, [], [], [], 0
    tokenizer = _tokenizer(checking.tokenizer) if checking.tokenizer else None
    every = max(1, len(task.items) // max(checking.shown, 1))
    every_measured = max(1, len(task.items) // MEASURED_PER_TASK)
    for number, item in enumerate(task.items):
        before = len(problems)
        if isinstance(item, Entry):
            record, image = _of_entry(item, checking, problems)
        else:
            record, image = _of_data_set(item, task.split, checking, problems)
        if record is None:
            continue
        with_image += image is not None
        try:
            check_form(record.turns, checking.form, record.id)
        except InputError as error:
            problems.append((MALFORMED, str(error)))
            continue
        measured = tokenizer is not None and number % every_measured == 0
        if tokenizer is not None:
            how = {"prompt_format": checking.prompt_format, "form": checking.form}
            if not has_target(record.turns, tokenizer, checking.max_tokens, **how):
                problems.append((MASKED, f"{record.id}: the first answer begins after {checking.max_tokens} tokens"))
            if measured:
                lengths.append(len(tokenizer.encode_pieces(render(record.turns, checking.prompt_format))[0]))
        if len(problems) == before and len(samples) < checking.shown and len(samples) * every <= number:
            try:
                if image is not None:
                    name = f"{record.id}: {image}" if isinstance(image, Path) else record.id
                    check_image(read_file(image) if isinstance(image, Path) else image, name)
                place = (item, task.split) if isinstance(image, bytes) else image
                samples.append(Sample(record._replace(image=None), place))
            except InputError as error:
                problems.append((IMAGE, str(error)))
        if len(problems) == before:
            problems += [(NOTE, f"{record.id}: {note}") for note in _notes(record, image is not None)]
    return Found(len(task.items), with_image, problems, lengths, samples)


def _notes(record: Record, has_image: bool) -> Iterator[str]:
    """What is odd about a record that can be used."""
    if not has_image and record.turns[0].text.strip().startswith(IMAGE_MARK):
        yield f"begins with {IMAGE_MARK} but names no image"
    if not all(turn.text.strip() for turn in record.turns[1::2]):
        yield "an answer is empty: the model learns to say nothing"


def _of_entry(entry: Entry, checking: Checking, problems: list) -> tuple[Record | None, Path | None]:
    """The record of an object and where its image lies; what is wrong with either is added to `problems`."""
    try:
        description = describe(entry)
    except InputError as error:
        problems.append((MALFORMED, str(error)))
        return None, None
    path = None
    if description.image is not None:
        try:
            path = image_path(checking.images, description.image, checking.any_suffix, entry.name)
            name = f"{entry.name}: {path}"
            if checking.decode:
                check_image(read_file(path), name)
            else:
                check_image_ends(path, name)
        except InputError as error:
            problems.append((IMAGE, str(error)))
    return Record(entry.name, None, description.turns), path


def _of_data_set(number: int, split: str, checking: Checking, problems: list) -> tuple[Record | None, bytes | None]:
    record = _source(checking.images, split)[number]
    if record.image is not None:
        try:
            (check_image if checking.decode else check_image_ends)(record.image, record.id)
        except InputError as error:
            problems.append((IMAGE, str(error)))
    return record, record.image


@functools.cache
def _source(folder: Path, split: str) -> RecordSource:
    return RecordSource.open(folder, split)


@functools.cache
def _tokenizer(source: str) -> Tokenizer:
    return Tokenizer.from_pretrained(source)


def _merge(parts: Iterable[Found]) -> Found:
    whole = Found(0, 0, [], [], [])
    for part in parts:
        whole = Found(*(a + b for a, b in zip(whole, part, strict=True)))
    return whole


def _report(found: Found, checking: Checking) -> bool:
    """Print what was found; whether nothing was that has to be mended."""
    by_kind: dict[str, list[str]] = {kind: [] for kind in TITLES}
    for kind, message in found.problems:
        by_kind[kind].append(message)
    for kind, messages in by_kind.items():
        if messages:
            print(f"{TITLES[kind]}: {len(messages):,}")
            print("".join(f"  {message}\n" for message in sorted(messages, key=_by_number)), end="")
    n_bad = sum(len(messages) for kind, messages in by_kind.items() if kind != NOTE)
    print(
        f"{found.records:,} records, {found.with_image:,} with an image: {f'{n_bad:,} problems' if n_bad else 'clean'}"
    )
    if not found.records:
        print("no records: there is nothing to learn from")
    if found.lengths:
        lengths = sorted(found.lengths)
        at = {part: lengths[int(part * (len(lengths) - 1))] for part in (0.5, 0.9, 0.99)}
        cut = sum(length > checking.max_tokens for length in lengths) / len(lengths)
        print(
            f"tokens, of {len(lengths):,} records: half have up to {at[0.5]:,}, 90 % {at[0.9]:,}, 99 % {at[0.99]:,}, "
            f"the longest {lengths[-1]:,}; {cut:.1%} are cut after {checking.max_tokens:,}"
        )
    if not checking.tokenizer:
        print("no --tokenizer: tokens were not counted, and records that are cut before their answer not looked for")
    return not n_bad and found.records > 0


def _by_number(message: str) -> list:
    """Sorts numbers in a text as numbers."""
    parts = "".join(c if c.isdigit() else f" {c} " for c in message.split(": ")[0]).split()
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in parts]


def _pick(samples: list[Sample], n: int, folder: Path) -> list[Record]:
    """`n` of the samples, spread over all, with their images."""
    picked = [samples[i * len(samples) // n] for i in range(n)] if len(samples) > n else samples
    return [record._replace(image=_image_of(place, folder)) for record, place in picked]


def _image_of(place: Path | tuple[int, str] | None, folder: Path) -> bytes | None:
    if isinstance(place, tuple):
        number, split = place
        return _source(folder, split)[number].image
    return None if place is None else read_file(place)


def _show(samples: list[Record], checking: Checking, config: MLMambaConfig, page: Path | None) -> None:
    tokenizer = _tokenizer(checking.tokenizer) if checking.tokenizer else None
    shown = [
        show.spans(record, tokenizer, checking.max_tokens, checking.prompt_format, checking.form) for record in samples
    ]
    colour = bool(os.environ.get("FORCE_COLOR")) or (sys.stdout.isatty() and not os.environ.get("NO_COLOR"))
    for record, parts in zip(samples, shown, strict=True):
        print(f"\n{show.headline(record, parts, config)}\n{show.terminal(parts, colour)}")
    if page is not None:
        page.write_text(show.page(samples, shown, config), encoding="utf-8")
        print(f"\nwrote {page}")


if __name__ == "__main__":
    main()
