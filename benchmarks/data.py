"""How fast records are checked, packed and read: python benchmarks/data.py [--records N] [--workers 1 2]

A data set in LLaVA's form is made up for it: photos of 640 x 427 pixels that come with scikit-learn, a seventh of the records text
alone, conversations of very different lengths cut from the documentation. Records a second by the clock, and a second of one core:

* check: without decoding, with a tokenizer besides, and decoding every image;
* prepare: packing, with every image decoded once; count: the tokens of what was packed;
* load: rows ready for --model, random, grouped and packed, and how much of what the model would read is no padding.

Prints a table and writes it, with versions and machine, to --out as JSON.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ml_mamba_jax.config import MLMambaConfig
from ml_mamba_jax.data import lengths
from ml_mamba_jax.data.loader import batches, make_order
from ml_mamba_jax.data.order import Batching
from ml_mamba_jax.data.samples import n_positions
from ml_mamba_jax.data.source import RecordSource
from ml_mamba_jax.tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]
N_IMAGES = 200
BATCH_SIZE, MAX_TOKENS, ROW_LENGTH = 16, 2048, 4096
COLUMNS = ("what", "workers", "records/s", "core", "filled")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--records", type=int, default=20_000)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=10, help="of loading, for each row (default 10)")
    parser.add_argument("--model", default="ml-mamba-3b", help="whose pixels are made (default ml-mamba-3b)")
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer.json (default: one trained on the texts)")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark-data.json"))
    args = parser.parse_args()
    rows = []

    def add(what: str, workers: int, speed: Speed, filled: float | None = None) -> None:
        rows.append(dict(zip(COLUMNS, (what, workers, *map(round, speed), filled and round(filled, 3)), strict=True)))
        shown = "" if filled is None else f"{filled:.1%}"
        print(f"{what:<20}{workers:>8}{speed.clock:>12,.0f}{speed.core:>12,.0f}{shown:>9}", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        tokenizer_file = make_data(place, args.records, args.tokenizer)
        data, tokens = [place / "chat.json", "--images", place / "images"], ["--tokenizer", tokenizer_file]
        print(f"{args.records:,} records on {os.cpu_count()} cores")
        print("{:<20}{:>8}{:>12}{:>12}{:>9}".format(*COLUMNS))
        for workers in args.workers:
            several = ["--workers", workers]
            add("check", workers, run("check", args.records, *data, *several))
            add("check, tokenizer", workers, run("check", args.records, *data, *several, *tokens))
            add("check, decode", workers, run("check", args.records, *data, *several, "--decode"))
            add("prepare", workers, run("prepare", args.records, *data, *several, "--out", place / f"packed-{workers}"))
        source = RecordSource.open(place / f"packed-{args.workers[0]}", "train")
        tokenizer, config = Tokenizer.from_pretrained(tokenizer_file), MLMambaConfig.named(args.model)
        with Stopwatch() as watch:
            lengths.measure(source, tokenizer, config.prompt_format)
        add("count", os.cpu_count() or 1, watch.speed(len(source)))
        for batching in ("random", "grouped", "packed"):
            for workers in (0, *args.workers):
                add(f"load, {batching}", workers, *load(source, tokenizer, config, batching, workers, args.seconds))
    result = {
        "benchmark": "data",
        "date": date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}",
        "python": platform.python_version(),
        "records": args.records,
        "rows": rows,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {args.out}")


def make_data(folder: Path, n_records: int, tokenizer: Path | None) -> Path:
    """Write a json list and a folder of images; returns a tokenizer.json."""
    from PIL import Image

    rng = np.random.default_rng(0)
    photos = [resources.files("sklearn.datasets.images") / name for name in ("china.jpg", "flower.jpg")]
    (folder / "images").mkdir()
    for i in range(N_IMAGES):
        with Image.open(photos[i % len(photos)]) as photo:
            photo.save(folder / "images" / f"{i}.jpg", quality=int(rng.integers(75, 95)))
    words = " ".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))).split()

    def text(mean_words: int) -> str:
        n, at = 1 + int(mean_words * rng.lognormal(-0.5, 1)), int(rng.integers(len(words)))
        return " ".join((words[at:] + words)[:n])

    entries = []
    for i in range(n_records):
        entry = {"id": f"{i:09d}", "conversations": []}
        for turn in range(int(rng.integers(1, 6))):
            question = text(12)
            if turn == 0 and i % 7:
                entry["image"], question = f"{i % N_IMAGES}.jpg", f"<image>\n{question}"
            entry["conversations"] += [{"from": "human", "value": question}, {"from": "gpt", "value": text(50)}]
        entries.append(entry)
    (folder / "chat.json").write_text(json.dumps(entries), encoding="utf-8")
    if tokenizer is None:
        trained = Tokenizer.train([" ".join(words)], 8000)
        tokenizer = trained.save(folder)
    return tokenizer


class Speed(NamedTuple):
    """Records per second: by the clock, and of a core's time."""

    clock: float
    core: float


class Stopwatch:
    """The clock, and the time of cores that this process and its children spend."""

    def __enter__(self) -> "Stopwatch":
        self._start = self._now()
        return self

    def __exit__(self, *_) -> None:
        self._end = self._now()

    def speed(self, n_records: int) -> Speed:
        return Speed(*(n_records / (end - start) for start, end in zip(self._start, self._end, strict=True)))

    @staticmethod
    def _now() -> tuple[float, float]:
        times = os.times()
        return time.perf_counter(), times.user + times.system + times.children_user + times.children_system


def run(command: str, n_records: int, *arguments) -> Speed:
    """The speed of a command, from its start to its end."""
    with Stopwatch() as watch:
        subprocess.run(
            [sys.executable, "-m", f"ml_mamba_jax.data.{command}", *map(str, arguments)],
            cwd=ROOT,
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
    return watch.speed(n_records)


def load(
    source: RecordSource, tokenizer: Tokenizer, config: MLMambaConfig, batching: Batching, workers: int, seconds: float
) -> tuple[Speed, float]:
    """The speed from the start of the workers to their end, and the part of what the model reads that is no padding."""
    options = {"batch_size": BATCH_SIZE, "max_tokens": MAX_TOKENS, "seed": 0}
    order = make_order(source, tokenizer, config, batching=batching, row_length=ROW_LENGTH, **options)
    records = read = positions = 0
    with Stopwatch() as watch:
        stream = batches(source, tokenizer, config, first=0, last=1_000_000, workers=workers, order=order, **options)
        started = time.perf_counter()
        for batch in stream:
            records += len(stream.ids)
            read += n_positions(batch, config)
            visual = config.n_visual_tokens if batch.images and batch.image_starts is None else 0
            positions += batch.tokens.size + len(batch.lengths) * visual
            if time.perf_counter() - started > seconds:
                break
        stream.close()
    return watch.speed(records), read / positions


if __name__ == "__main__":
    main()
