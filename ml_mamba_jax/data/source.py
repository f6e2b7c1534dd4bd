"""Random access to records on disk."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ml_mamba_jax.data.records import Record
from ml_mamba_jax.data.shards import CONTENTS_FILE, check_contents, record_features
from ml_mamba_jax.errors import InputError
from ml_mamba_jax.prompt import Turn

SAMPLED = 64
"""Records, spread over a split, that are read for its fingerprint."""


class RecordSource(Sequence[Record]):
    """The records of one split of a data set that a builder prepared, by index."""

    def __init__(self, builder, split: str):
        self._examples = builder.as_data_source(split)
        self.folder, self.split = Path(builder.data_dir), split
        self._name = f"{builder.info.full_name}[{split}]"
        self._files = sorted(map(str, builder.info.splits[split].filepaths))

    @classmethod
    def open(cls, folder: Path, split: str) -> "RecordSource":
        """The records of a folder that `ml_mamba_jax.data.prepare`, or any tfds builder of the same features, wrote.

        Raises:
            InputError: no data set there, none of that split, or shards that are missing or cut off.
        """
        builder = _builder(folder)
        check_contents(folder)
        if split not in builder.info.splits:
            raise InputError(f"{folder}: got no split {split!r}, expected one of {', '.join(builder.info.splits)}")
        return cls(builder, split)

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(f"{self}: got index {index}")
        example = self._examples[index]
        turns = example["conversations"]
        return Record(
            id=example["id"].decode(),
            image=example["image"] or None,
            turns=tuple(
                Turn(role.decode(), text.decode()) for role, text in zip(turns["from"], turns["value"], strict=True)
            ),
            kind=example["kind"].decode(),
        )

    def fingerprint(self) -> str:
        """Tells another data set from this one, wherever it lies: by the number of records, the sizes of their files, and some of
        the records. Of one that `ml_mamba_jax.data.prepare` wrote any change shows, for it has noted what it was made of.
        """
        digest = hashlib.sha256()
        for path in map(Path, self._files):
            digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        contents = self.folder / CONTENTS_FILE
        digest.update(contents.read_bytes() if contents.is_file() else b"")
        for number in np.unique(np.linspace(0, len(self) - 1, min(len(self), SAMPLED)).astype(int)):
            record = self[int(number)]
            digest.update(repr((record.id, record.kind, record.turns)).encode())
            digest.update(record.image or b"")
        return f"{len(self)} records {digest.hexdigest()[:12]}"

    def __repr__(self) -> str:
        return f"RecordSource({self._name}, {len(self)} records)"


def splits_of(folder: Path) -> list[str]:
    """The names of the splits of a prepared data set. Raises InputError where there is none."""
    return list(_builder(folder).info.splits)


def _builder(folder: Path):
    import tensorflow_datasets as tfds

    if not (folder / "dataset_info.json").is_file():
        raise InputError(
            f"{folder}: found no dataset_info.json, expected a prepared data set (python -m ml_mamba_jax.data.prepare)"
        )
    try:
        builder = tfds.builder_from_directory(folder)
        found, expected = (set(features.keys()) for features in (builder.info.features, record_features()))
        if found != expected:
            raise ValueError(f"got {', '.join(sorted(found))}, expected {', '.join(sorted(expected))}")
    except Exception as error:  # whatever tfds makes of a damaged file
        what = (str(error).strip().splitlines() or [repr(error)])[0][:200]
        raise InputError(
            f"{folder}: dataset_info.json or features.json is damaged, or another data set's: {what}; copy or prepare it again"
        ) from error
    return builder
