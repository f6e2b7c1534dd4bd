"""The plan of a conversion: which tensor fills which parameter, and everything that does not fit, in one table."""

import math
from typing import NamedTuple

import jax
import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict

from ml_mamba_jax.convert.pieces import Piece, by_key, torch_shape
from ml_mamba_jax.convert.source import Source, missing_encoders
from ml_mamba_jax.model import MLMamba

Shape = tuple[int, ...]
FLOATS = {np.dtype(d) for d in (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)}


class Finding(NamedTuple):
    """Something to say about one tensor, or the tokenizer. `is_problem`: the conversion cannot go on."""

    what: str
    """missing, unexpected, shape, dtype, tied, padded, not needed, resampled, not finite, tokenizer, assumed."""
    key: str
    detail: str
    is_problem: bool


class Plan(NamedTuple):
    """What will be done: parameters by path, the pieces of each tensor that is read, and the findings."""

    shapes: dict[str, jax.ShapeDtypeStruct]
    """Of the parameters that are made, by path."""
    pieces: dict[str, list[Piece]]
    """By key of the tensor."""
    findings: list[Finding]

    @property
    def n_bytes(self) -> int:
        """Of the parameters."""
        return sum(shape.size * shape.dtype.itemsize for shape in self.shapes.values())

    @property
    def problems(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.is_problem]


def make_plan(source: Source) -> Plan:
    """Lay the tables over the tensors that are there. Reads no data."""
    shapes = flatten_dict(MLMamba(source.config).param_shapes(), sep="/")
    for name in missing_encoders(source):
        shapes = {path: shape for path, shape in shapes.items() if not path.startswith(f"vision/{name}/")}
    wanted, present = by_key(source.pieces), set(source.keys)
    findings = [Finding("tokenizer", name, detail, False) for name, detail in source.notes]
    findings += [Finding("assumed", name, detail, False) for name, detail in source.assumed]
    used = {}
    for key, pieces in wanted.items():
        if key not in present:
            if not all(piece.tied for piece in pieces):
                findings.append(Finding("missing", key, f"expected for {pieces[0].where}", True))
            continue
        fitted, finding = _fit(key, pieces, source, shapes)
        used[key] = fitted
        if finding:
            findings.append(finding)
        if all(piece.tied for piece in pieces):
            findings.append(Finding("tied", key, f"must equal {pieces[0].path}", False))
    for key in source.keys:
        if key in wanted:
            continue
        if key in source.not_needed:
            findings.append(Finding("not needed", key, "the model does not run it", False))
        else:
            findings.append(Finding("unexpected", key, "no parameter here takes it", True))
    filled = {piece.path for piece in source.pieces}
    findings += [Finding("missing", "-", f"nothing fills {path}", True) for path in shapes if path not in filled]
    return Plan(shapes, used, findings)


def _fit(
    key: str, pieces: list[Piece], source: Source, shapes: dict[str, jax.ShapeDtypeStruct]
) -> tuple[list[Piece], Finding | None]:
    """The pieces for a tensor as it is, which may be fewer rows of the vocabulary or another grid of positions."""
    info = source.info(key)
    expected = torch_shape(pieces, {piece.path: shapes[piece.path].shape for piece in pieces})
    if info.dtype not in FLOATS:
        return pieces, Finding("dtype", key, f"got {info.dtype}, expected floating point", True)
    if info.shape == expected:
        return [piece._replace(resampled=False) for piece in pieces], None
    wrong = Finding("shape", key, f"got {list(info.shape)}, expected {list(expected)} for {pieces[0].where}", True)
    if len(info.shape) != len(expected):
        return pieces, wrong
    if pieces[-1].path == "language/embedding" or pieces[-1].path == "language/head":
        vocab_size = source.config.language.vocab_size
        if info.shape[1:] == expected[1:] and vocab_size <= info.shape[0] < expected[0]:
            rows = slice(0, info.shape[0])
            index = (rows,) if pieces[0].path.endswith("embedding") else (slice(None), rows)
            padded = Finding("padded", key, f"rows {info.shape[0]} to {expected[0] - 1} are zeros", False)
            return [piece._replace(index=index) for piece in pieces], padded
    differs_in_rows = info.shape[:-2] == expected[:-2] and info.shape[-1] == expected[-1]
    if differs_in_rows and any(piece.resampled for piece in pieces):
        n_other = expected[-2] - shapes[pieces[-1].path].shape[0]  # the class token's
        n_positions = info.shape[-2] - n_other
        if n_positions > 0 and math.isqrt(n_positions) ** 2 == n_positions:
            side, new = math.isqrt(n_positions), math.isqrt(expected[-2] - n_other)
            return pieces, Finding("resampled", key, f"positions {side} x {side} -> {new} x {new}", False)
    if info.shape == expected[::-1] and len(expected) == 2:
        return pieces, wrong._replace(detail=f"{wrong.detail}: it is transposed")
    return pieces, wrong
