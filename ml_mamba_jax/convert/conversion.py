"""Whole conversions, as the command line makes them."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ml_mamba_jax.convert import check as checking
from ml_mamba_jax.convert import report, to_jax, to_torch
from ml_mamba_jax.convert.check import Comparison
from ml_mamba_jax.convert.plan import Finding, make_plan
from ml_mamba_jax.convert.source import open_source
from ml_mamba_jax.errors import ConvertError, InputError


class Conversion(NamedTuple):
    """What was done: text to print, what there was to say about tensors, and how both models compare, if that was asked for."""

    report: str
    findings: list[Finding]
    comparisons: list[Comparison]


def import_torch(
    src: str | Path,
    out: str | Path | None,
    *,
    kind: str | None = None,
    encoder: str | None = None,
    vision: Sequence[str | Path] = (),
    tokenizer: str | Path | None = None,
    dtype: str = "float32",
    check: bool = False,
    dry_run: bool = False,
    progress: bool = False,
) -> Conversion:
    """Convert PyTorch weights into a folder for `load_params`, `train.py` and `chat`.

    Args:
        src: a file or folder; what it holds is found out, `kind` (a name of `families.FAMILIES`) overrides that.
        out: the folder to make. With `dry_run`, which reads everything and writes nothing, it may be None.
        encoder, vision, tokenizer: as in `source.open_source`.
        dtype: in which the parameters are kept, but for A_log, D and dt_bias, which stay float32.
        check: run both models on random inputs before anything is written.
        progress: show a bar on stderr.

    Raises:
        ConvertError: files that cannot be read, tensors that do not fit (all of them in one table), or models that differ.
        InputError: `out` exists, or cannot be written.
    """
    if out is not None:
        to_jax.check_absent(Path(out))
    with open_source(src, kind, encoder=encoder, vision=vision, tokenizer=tokenizer, dtype=dtype) as source:
        plan = make_plan(source)
        text = report.describe(source, plan) if dry_run else report.summary(source, plan)
        if not dry_run:
            to_jax.check_room(Path(out), plan.n_bytes)
        try:
            params = to_jax.assemble(source, plan, progress=progress)
        except ConvertError as error:
            if dry_run:  # the problems first, then the plan they are about
                raise ConvertError(f"{error}\n\n{text}") from error
            raise
        comparisons = checking.compare(source, params) if check else []
        if not dry_run:
            to_jax.write(source, plan, params, Path(out))
    return Conversion(text, plan.findings, comparisons)


def export_torch(
    folder: str | Path,
    out: str | Path | None,
    *,
    form: to_torch.Form | None = None,
    dtype: str | None = None,
    check: bool = False,
    dry_run: bool = False,
    progress: bool = False,
) -> Conversion:
    """Convert a folder of ours into PyTorch weights, see `to_torch.open_export`. `check` reads them back and runs both models.

    Raises:
        ConvertError: parts that the form needs and the folder lacks, or models that differ: then nothing is left.
        InputError: both `check` and `dry_run`.
    """
    if dry_run and check:
        raise InputError(
            "check: got it for a dry run to torch, which writes nothing that could be read back; leave one away"
        )
    export = to_torch.open_export(Path(folder), form, dtype)
    if dry_run:
        return Conversion(export.describe(), [], [])
    out = Path(out)
    to_torch.write(export, out, progress=progress)
    comparisons: list[Comparison] = []
    if check:
        try:
            for path in to_torch.parts(out):
                with open_source(path) as source:
                    comparisons += checking.compare(source, export.params, as_dtype=dtype)
        except BaseException:
            shutil.rmtree(out)
            raise
    return Conversion(export.summary, [], comparisons)
