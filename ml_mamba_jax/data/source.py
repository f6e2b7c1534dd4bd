"""Random access to records on disk."""

from collections.abc import Sequence
from pathlib import Path

from ml_mamba_jax.data.records import Record
from ml_mamba_jax.data.shards import check_contents
from ml_mamba_jax.errors import InputError
from ml_mamba_jax.prompt import Turn


class RecordSource(Sequence[Record]):
    """The records of one split of a data set that a builder prepared, by index."""

    def __init__(self, builder, split: str):
        self._examples = builder.as_data_source(split)
        self.folder, self.split = Path(builder.data_dir), split
        self._name = f"{builder.info.full_name}[{split}]"

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
    return tfds.builder_from_directory(folder)
