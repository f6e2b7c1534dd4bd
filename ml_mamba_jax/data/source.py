"""Random access to records on disk."""

from collections.abc import Sequence

from ml_mamba_jax.data.records import Record
from ml_mamba_jax.prompt import Turn


class RecordSource(Sequence[Record]):
    """The records of one split of a data set that a builder prepared, by index."""

    def __init__(self, builder, split: str):
        self._examples = builder.as_data_source(split)
        self._name = f"{builder.info.full_name}[{split}]"

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
