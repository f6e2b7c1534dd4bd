"""A plan as text: every tensor with what becomes of it, layers and directions folded into one line, and the findings."""

import re
from collections.abc import Iterable

import numpy as np

from ml_mamba_jax.convert.pieces import Piece
from ml_mamba_jax.convert.plan import Finding, Plan, Shape
from ml_mamba_jax.convert.source import Source

MOST_SHOWN = 60
MOST_LAYERS = 8
LAYER = r"\b(?:layers?|blocks)\.(\d+)\."


def describe(source: Source, plan: Plan) -> str:
    """What was found, how each tensor is laid out, and everything that is worth a look."""
    used = ((key, *source.info(key)[:2], pieces) for key, pieces in plan.pieces.items())
    parts = [summary(source, plan), tensors(used)]
    if plan.findings:
        parts.append(findings(plan.findings))
    return "\n\n".join(parts)


def summary(source: Source, plan: Plan) -> str:
    n_params = sum(shape.size for shape in plan.shapes.values())
    counts = {}
    for finding in plan.findings:
        counts[finding.what] = counts.get(finding.what, 0) + 1
    rows = [
        ("kind", source.kind),
        ("files", ", ".join(str(file) for file in source.files)),
        ("tensors", f"{len(source.keys):,}, of which {len(plan.pieces):,} are used"),
        ("parameters", f"{n_params:,} in {len(plan.shapes)} arrays, {plan.n_bytes / 1e9:.2f} GB"),
        ("findings", ", ".join(f"{n} {what}" for what, n in counts.items()) or "none"),
    ]
    return table(rows)


def tensors(read: Iterable[tuple[str, Shape, np.dtype, list[Piece]]], *, with_dtype: bool = True) -> str:
    """One line for each kind of tensor, (key, shape, dtype, pieces): `{i}` stands for the layers."""
    folded: dict[tuple[str, ...], int] = {}
    for key, shape, dtype, pieces in read:
        for piece in pieces:
            row = (_fold(key), str(list(shape)), str(dtype), piece.how, _fold(piece.where))
            folded[row] = folded.get(row, 0) + 1
    rows = [("tensor", "shape", "dtype", "transform", "parameter", "")]
    rows += [(*row, f"x {n}" if n > 1 else "") for row, n in folded.items()]
    return table(rows if with_dtype else [row[:2] + row[3:] for row in rows])


def findings(found: Iterable[Finding]) -> str:
    """The findings, problems first; equal ones of several layers are one line that names the layers."""
    folded: dict[tuple[str, str, str, str], list[Finding]] = {}
    for finding in sorted(found, key=lambda f: not f.is_problem):
        row = ("problem" if finding.is_problem else "", finding.what, _fold(finding.key), _fold(finding.detail))
        folded.setdefault(row, []).append(finding)
    rows = []
    for row, alike in folded.items():
        if len(alike) == 1:
            rows.append((*row[:2], alike[0].key, alike[0].detail, ""))
        else:
            rows.append((*row, f"x {len(alike)}{_layers(alike)}"))
    more = f"\n... and {len(rows) - MOST_SHOWN} more" if len(rows) > MOST_SHOWN else ""
    return table(rows[:MOST_SHOWN]) + more


def _layers(alike: list[Finding]) -> str:
    """Which layers, if these are some of a kind."""
    numbers = [found[1] for finding in alike if (found := re.search(LAYER, finding.key))]
    more = f" and {len(numbers) - MOST_LAYERS} more" if len(numbers) > MOST_LAYERS else ""
    return f": layers {', '.join(numbers[:MOST_LAYERS])}{more}" if numbers else ""


def _fold(text: str) -> str:
    """Numbers of layers -> {i}."""
    text = re.sub(LAYER, lambda found: found[0].replace(found[1], "{i}"), text)
    return re.sub(r"(blocks/[\w/]+\[)\d+", r"\1i", text)


def table(rows: Iterable[tuple[str, ...]]) -> str:
    """Columns, as wide as their widest entry."""
    rows = [tuple(map(str, row)) for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))] if rows else []
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
