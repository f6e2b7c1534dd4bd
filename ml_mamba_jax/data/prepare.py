"""Pack records and their images for training: python -m ml_mamba_jax.data.prepare FILE ... [--images DIR]

FILE is a json list in LLaVA's form, a jsonl file, or a folder with a metadata.jsonl; see docs/data.md. All images are decoded once,
to see that they can be. The data set appears in its place when it is whole. A call that was interrupted goes on where it was.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from ml_mamba_jax.data import llava
from ml_mamba_jax.data.builders import default_place
from ml_mamba_jax.data.lengths import measure
from ml_mamba_jax.data.parallel import default_workers
from ml_mamba_jax.data.shards import LEFT_OUT_FILE, Packing, pack
from ml_mamba_jax.data.source import RecordSource, splits_of
from ml_mamba_jax.errors import InputError, one_line_errors
from ml_mamba_jax.prompt import prompt_format
from ml_mamba_jax.tokenizer import Tokenizer


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m ml_mamba_jax.data.prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="records; several files are one data set")
    parser.add_argument(
        "--images", type=Path, metavar="DIR", help="what image paths are relative to (default: beside FILE)"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="place of the data set (default: one below data/, by its contents)"
    )
    parser.add_argument(
        "--workers", type=int, default=default_workers(), help="processes (default: %(default)s, the cores)"
    )
    parser.add_argument(
        "--max-bad",
        type=float,
        default=0.0,
        metavar="PART",
        help="leave out up to this part of the records (default 0)",
    )
    parser.add_argument(
        "--held-out",
        type=float,
        default=0.0,
        metavar="PART",
        help="a test split of this part of the images (default 0)",
    )
    parser.add_argument("--any-suffix", action="store_true", help="take x.png or x.gif where x.jpg is missing")
    parser.add_argument("--tokenizer", help="count tokens too, so that grouped and packed training starts at once")
    parser.add_argument(
        "--form", choices=("chat", "caption"), default="chat", help="what --tokenizer counts (default: %(default)s)"
    )
    parser.add_argument("--prompt-format", default="zephyr", help="what --tokenizer counts (default: %(default)s)")
    args = parser.parse_args(arguments)
    with one_line_errors():
        if not 0 <= args.max_bad < 1:
            raise InputError(f"--max-bad: got {args.max_bad}, expected a part of the records, from 0 to below 1")
        files = tuple(map(llava.json_file, args.files))
        tokenizer = Tokenizer.from_pretrained(args.tokenizer) if args.tokenizer else None
        prompt_format(args.prompt_format)  # only for its check
        if not 0 <= args.held_out < 1:
            raise InputError(f"--held-out: got {args.held_out}, expected a part of the images, from 0 to below 1")
        images = llava.image_folder_of(files, args.images)
        packing = Packing(files, images, args.max_bad, args.any_suffix, args.held_out)
        place = args.out or default_place(Path("data"), packing)
        pack(packing, place, args.workers)
        splits = {split: RecordSource.open(place, split) for split in splits_of(place)}
        if tokenizer is not None:
            measure(splits["train"], tokenizer, args.prompt_format, args.form)
        print(f"{place}: {', '.join(f'{len(source):,} {split} records' for split, source in splits.items())}")
        left_out = place / LEFT_OUT_FILE
        if left_out.is_file():
            print(f"{len(left_out.read_text(encoding='utf-8').splitlines()):,} left out, listed in {left_out}")


if __name__ == "__main__":
    main()
