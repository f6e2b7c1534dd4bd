"""PyTorch weights -> a folder that `load_params`, `train.py` and `chat` take."""

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from ml_mamba_jax import checkpoint, manifest, serialize
from ml_mamba_jax.convert.pieces import Piece
from ml_mamba_jax.convert.plan import Finding, Plan
from ml_mamba_jax.convert.report import findings as as_table
from ml_mamba_jax.convert.source import Source, missing_encoders
from ml_mamba_jax.errors import ConvertError, InputError
from ml_mamba_jax.vit import resample_positions

ALIGNMENT = 64
"""Bytes."""


def assemble(source: Source, plan: Plan, *, progress: bool = False) -> dict[str, np.ndarray]:
    """Read every tensor once, and lay it where it belongs: the parameters by path.

    Each parameter is allocated once in its final dtype, and tensors are read from the mapped files straight into it: memory grows
    to the size of the parameters and no further.

    Args:
        progress: show a bar with bytes read and their rate on stderr.

    Raises:
        ConvertError: tensors that do not fit, are not finite (also after a cast to a narrower dtype), or should be equal and are
            not; all of them in one table.
    """
    unfit = {finding.key for finding in plan.problems}
    problems: list[Finding] = []
    params: dict[str, np.ndarray] = {}
    for key, pieces in _with_progress(source, plan, progress):
        if key in unfit:
            continue
        tensor = source.read(key)
        for piece in pieces:
            if piece.tied and piece.path not in params:
                continue  # what it must equal is not there
            if piece.path not in params:
                params[piece.path] = _zeros(plan.shapes[piece.path].shape, plan.shapes[piece.path].dtype)
            problems += _place(key, piece, tensor, params[piece.path])
    if problems or plan.problems:
        n_problems = len(problems) + len(plan.problems)
        table = as_table([*plan.findings, *problems])
        raise ConvertError(f"{source.path}: {n_problems} problems, nothing was written\n{table}")
    return params


def _place(key: str, piece: Piece, tensor: np.ndarray, parameter: np.ndarray) -> list[Finding]:
    """Lay one tensor, or a part of it, into its parameter."""
    values = piece.layout.to_jax(tensor[piece.source])
    region = piece.region(parameter)
    if piece.tied:
        with np.errstate(all="ignore"):  # what is not finite after the cast was told of the other tensor
            is_equal = np.array_equal(region, values.astype(parameter.dtype, copy=False), equal_nan=True)
        return [] if is_equal else [Finding("tied", key, f"differs from {piece.where}, expected equal numbers", True)]
    if piece.resampled and values.shape != region.shape:
        side = math.isqrt(len(region))
        values = np.asarray(resample_positions(jnp.asarray(values, jnp.float32), (side, side)))
    with np.errstate(all="ignore"):  # infinities are told below
        region[...] = region + values if piece.added else values
    if not np.isfinite(region).all():
        return [Finding("not finite", key, f"NaN or infinity as {parameter.dtype}", True)]
    return []


def write(source: Source, plan: Plan, params: Mapping[str, np.ndarray], out: Path) -> None:
    """Write the folder aside, and rename it when it is whole: killed at any point, `out` is absent or complete.

    Raises:
        InputError: `out` exists.
    """
    check_absent(out)
    with aside(out) as folder:
        checkpoint.write_model(folder, source.config, source.tokenizer)
        # orbax copies NumPy's arrays, but not JAX's; these share their memory with ours.
        tree = jax.device_put(unflatten_dict(dict(params), sep="/"), jax.devices("cpu")[0], may_alias=True)
        try:
            checkpoint.save(folder, 0, {checkpoint.PARAMS: tree})
        except ValueError as error:  # of tensorstore, whatever is wrong with the disk
            raise InputError(f"{out}: cannot be written: {str(error).splitlines()[0][-200:]}") from error
        serialize.write_text(folder / checkpoint.CONVERSION_FILE, json.dumps(record(source, plan), indent=1) + "\n")


def check_absent(out: Path) -> None:
    """Raise InputError if `out` exists, or no folder can be made there."""
    if os.path.lexists(out):
        raise InputError(f"{out}: exists already; name another folder or remove it")
    parent = _existing_parent(out)
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(f"{out}: cannot be written: {parent} is no folder that you may write to; name another one")


def check_room(out: Path, n_bytes: int) -> None:
    """Raise InputError if the disk has no room for so much."""
    free = shutil.disk_usage(_existing_parent(out)).free
    if n_bytes > free:
        raise InputError(
            f"{out}: needs {n_bytes / 1e6:,.2f} MB, but {free / 1e6:,.2f} MB are free; make room or choose another place"
        )


def _existing_parent(out: Path) -> Path:
    return next(folder for folder in out.absolute().parents if folder.exists())


@contextmanager
def aside(out: Path) -> Iterator[Path]:
    """A new folder beside `out` that takes its name when the block ends well, and is removed when it does not."""
    folder = out.with_name(f".{out.name}.partial")
    shutil.rmtree(folder, ignore_errors=True)  # of a conversion that was killed
    try:
        folder.mkdir(parents=True)
        yield folder
        folder.rename(out)
    except OSError as error:
        raise InputError(f"{out}: cannot be written: {error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def record(source: Source, plan: Plan) -> dict:
    """What was done, as JSON: source files with their SHA-256, and what became of every tensor, in the order of the source."""
    tensors = []
    for key in source.keys:
        info, once = source.info(key), source.shares_memory(key)
        for piece in plan.pieces.get(key, ()):
            tensors.append(
                {
                    "key": key,
                    "file": _label(info.file, source),
                    "shape": list(info.shape),
                    "dtype": str(info.dtype),
                    "transform": piece.how,
                    "parameter": piece.where,
                    **({"stored": "with another tensor"} if once else {}),
                }
            )
    return {
        "kind": source.kind,
        "source": source.path.name,
        "files": {_label(file, source): manifest.sha256(file) for file in [*source.files, *source.documents]},
        "param_dtype": source.config.param_dtype,
        "missing_encoders": missing_encoders(source),
        "tensors": tensors,
        "findings": [finding._asdict() for finding in plan.findings],
    }


def _label(file: Path, source: Source) -> str:
    """The path of a file inside the source, or all of it for a file from elsewhere: names alone are often the same."""
    root = source.path if source.path.is_dir() else source.path.parent
    return file.relative_to(root).as_posix() if file.is_relative_to(root) else str(file)


def _zeros(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Aligned so that JAX takes it for its own on a CPU without copying."""
    n_bytes = math.prod(shape) * dtype.itemsize
    memory = np.zeros(n_bytes + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + n_bytes].view(dtype).reshape(shape)


def _with_progress(source: Source, plan: Plan, show: bool) -> Iterator[tuple[str, list[Piece]]]:
    from tqdm import tqdm

    # Tied tensors are compared with what the others have filled.
    in_order = sorted(plan.pieces.items(), key=lambda item: item[1][0].tied)
    total = sum(source.read(key).nbytes for key, _ in in_order)
    with tqdm(total=total, unit="B", unit_scale=True, desc="converting", disable=not show) as bar:
        for key, pieces in in_order:
            yield key, pieces
            bar.update(source.read(key).nbytes)
