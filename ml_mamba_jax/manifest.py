"""What a folder held when it was written: SHA-256 of every file. It shows that all are there, no others, and as they were."""

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ml_mamba_jax import serialize
from ml_mamba_jax.errors import CheckpointError

MANIFEST_FILE = "manifest.json"


def write(folder: Path, step: int) -> None:
    """Note all files of the folder, that of a checkpoint of that step, and wait until all of it is on disk."""
    with ThreadPoolExecutor(1) as thread:
        on_disk = thread.submit(_sync, folder)  # while it is waited for, the files are read back from memory
        digests = _digests(folder, _files(folder))
        on_disk.result()
    serialize.write_text(folder / MANIFEST_FILE, _as_text({"step": step, "sha256": digests}))
    serialize.sync(folder)


def check(folder: Path, step: int, names: Iterable[str] | None = None) -> None:
    """Compare the folder with what was noted. `names`: read these files only, which is less than to know that all are whole.

    Raises:
        CheckpointError: a file is missing, does not belong there, or differs; names it.
    """
    path = folder / MANIFEST_FILE
    try:
        text = path.read_text(encoding="utf-8")
        noted = json.loads(text)
        expected, is_of = dict(noted["sha256"]), noted.get("step", step)  # version 0.1 did not note it
        if text != _as_text(noted):
            raise ValueError
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: step {step}: the file is missing") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: step {step}: the file differs from what was written") from error
    if is_of != step:
        raise CheckpointError(f"{path}: step {step}: got the files of step {is_of}")
    for name in sorted(expected.keys() ^ (_files(folder) - {MANIFEST_FILE})):
        what = "the file is missing" if name in expected else "the file does not belong there"
        raise CheckpointError(f"{folder / name}: step {step}: {what}")
    for name, digest in _digests(folder, expected if names is None else names).items():
        if digest != expected[name]:
            raise CheckpointError(f"{folder / name}: step {step}: the file differs from its SHA-256")


def sha256(path: Path) -> str:
    """Of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        serialize.sync(path)


def _digests(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Of files by name, as many at a time as there are cores."""
    names = sorted(names)
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        return dict(zip(names, threads.map(lambda name: sha256(folder / name), names), strict=True))


def _as_text(noted: dict[str, Any]) -> str:
    return json.dumps(noted, indent=1) + "\n"
