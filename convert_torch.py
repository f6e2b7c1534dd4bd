"""Convert PyTorch weights, in both directions: python convert_torch.py SRC OUT [--to jax|torch] [--check] [--dry-run]

To JAX, SRC is a file or folder with a Mamba-2 language model (state-spaces/mamba or transformers), an image encoder (timm,
open_clip or transformers), or a run of ML-Mamba; which of them is found out. OUT becomes a folder that `load_params`, `train.py`
and `python -m ml_mamba_jax.chat` take. To PyTorch, SRC is such a folder. Nothing is written unless everything fits.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import get_args

from ml_mamba_jax import convert
from ml_mamba_jax.arguments import OneLineParser
from ml_mamba_jax.config import VISION_ENCODERS
from ml_mamba_jax.convert.check import as_table
from ml_mamba_jax.convert.families import FAMILIES
from ml_mamba_jax.convert.to_torch import DTYPES, Form
from ml_mamba_jax.errors import InputError, one_line_errors
from ml_mamba_jax.names import unknown

DIRECTIONS = ("jax", "torch")
FORMS = get_args(Form)


def main(arguments: Sequence[str] | None = None) -> None:
    with one_line_errors():
        args = _parser().parse_args(arguments)
        _check(args)
        if args.to == "jax":
            conversion = convert.import_torch(
                args.src,
                args.out,
                kind=args.kind,
                encoder=args.encoder,
                vision=args.vision,
                tokenizer=args.tokenizer,
                dtype=args.dtype or "float32",
                check=args.check,
                dry_run=args.dry_run,
                progress=True,
            )
        else:
            conversion = convert.export_torch(
                args.src,
                args.out,
                form=args.kind,
                dtype=args.dtype,
                check=args.check,
                dry_run=args.dry_run,
                progress=True,
            )
        print(conversion.report)
        if conversion.comparisons:
            print(f"\n{as_table(conversion.comparisons)}")
        if not args.dry_run:
            print(f"\nwrote {args.out}", file=sys.stderr)


def _check(args: argparse.Namespace) -> None:
    if args.out is None and not args.dry_run:
        raise InputError("OUT: got none, expected the folder to write; leave it away with --dry-run only")
    kinds = FORMS if args.to == "torch" else tuple(FAMILIES)
    for option, value, known in (
        ("to", args.to, DIRECTIONS),
        ("kind", args.kind, kinds),
        ("dtype", args.dtype, DTYPES),
    ):
        if value is not None and value not in known:
            raise InputError(f"--{option}: {unknown(option, value, known)}")
    if args.to == "torch":
        for option in ("encoder", "vision", "tokenizer"):
            if getattr(args, option):
                raise InputError(f"--{option}: got one with --to torch, expected it with --to jax only")


def _parser() -> OneLineParser:
    parser = OneLineParser("convert_torch.py", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawTextHelpFormatter
    add = parser.add_argument
    add("src", metavar="SRC", help="weights to convert: a file or a folder")
    add("out", metavar="OUT", nargs="?", help="folder to make; must not exist")
    add("--to", metavar="|".join(DIRECTIONS), default="jax", help="direction (default jax)")
    kinds = "\n".join(f"  {name:10} {family.description}" for name, family in FAMILIES.items())
    add("--kind", help=f"what SRC is, instead of looking at its tensors:\n{kinds}\nto torch: {', '.join(FORMS)}")
    dtypes = f"one of {', '.join(DTYPES)}"
    add("--dtype", help=f"{dtypes}:\nof the parameters (default float32), or of the tensors (default: as they came)")
    add("--vision", metavar="PATH", action="append", default=[], help="weights of an encoder of a run; may be repeated")
    add("--encoder", metavar="NAME", help=f"convert an encoder for one of:\n{', '.join(VISION_ENCODERS)}")
    add("--tokenizer", metavar="FILE", help="tokenizer.json to go with the weights (default: the one beside them)")
    add("--check", action="store_true", help="run both models on random inputs and print how they differ")
    add("--dry-run", action="store_true", help="read everything, print the plan and all findings, write nothing")
    return parser


if __name__ == "__main__":
    main()
