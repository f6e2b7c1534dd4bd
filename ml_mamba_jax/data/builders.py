"""Data sets on disk, in array_record files that need no TensorFlow, written where they are not there yet.

`DigitsVQA`, a tfds builder, composes the demo's scenes; `prepare_llava` packs json files and their images. Both write the same
features, and `ml_mamba_jax.data.source` reads what either wrote.
"""

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from ml_mamba_jax.data import llava, scenes
from ml_mamba_jax.data.parallel import default_workers
from ml_mamba_jax.data.records import Record
from ml_mamba_jax.data.shards import NAME, VERSION, Packing, example, pack, record_features, source_digest
from ml_mamba_jax.prompt import IMAGE_MARK, Turn

TURNS = 2
"""Questions in a training conversation: with more of them, the answers before would give away the next."""


class RecordBuilder(tfds.core.GeneratorBasedBuilder):
    """What all builders share: the features of a record, and how they are prepared."""

    BUILDER_CONFIGS = []  # noqa: RUF012, tfds wants a list

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(builder=self, description=type(self).__doc__, features=record_features())

    def _generate_examples(self, records: Iterator[Record]):
        for record in records:
            yield record.id, example(record)


@dataclasses.dataclass(eq=False, kw_only=True)
class DigitsConfig(tfds.core.BuilderConfig):
    """How many scenes each split has."""

    train_scenes: int
    test_scenes: int


class DigitsVQA(RecordBuilder):
    """Questions about scenes of real handwritten digits.

    A training record is one scene with `TURNS` of its questions in random order. The test split has one record for each
    question about its scenes, whose digits no training scene shows.
    """

    name = "digits_vqa"

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(self._records(split)) for split in ("train", "test")}

    def _records(self, split: str) -> Iterator[Record]:
        digits = scenes.load_digits()
        members = scenes.split_digits(digits.labels)[split]
        seed = ("train", "test").index(split)
        n_scenes = getattr(self.builder_config, f"{split}_scenes")
        rng = np.random.default_rng(seed + 100)
        for i, scene in enumerate(scenes.scenes(digits, members, n_scenes, seed)):
            name = f"{split}-{i:06d}"
            if split == "train":
                questions = list(scene.questions)
                del questions[-rng.integers(1, 3)]  # one of the two about presence, which would crowd out the positions
                order = rng.permutation(len(questions))[:TURNS]
                yield Record(name, scene.png, _turns([questions[j] for j in order]))
            else:
                for j, question in enumerate(scene.questions):
                    yield Record(f"{name}-{j}", scene.png, _turns([question]), question.kind)


def _turns(questions: Sequence[scenes.Question]) -> tuple[Turn, ...]:
    """A conversation that asks the questions in order, the image mark before the first."""
    turns = []
    for i, (_, question, answer) in enumerate(questions):
        turns += [Turn("human", question if i else f"{IMAGE_MARK}\n{question}"), Turn("gpt", answer)]
    return tuple(turns)


def prepare_digits(folder: Path, train_scenes: int, test_scenes: int) -> tfds.core.DatasetBuilder:
    """Write the demo's scenes below `folder`, unless they are there already."""
    config = DigitsConfig(
        name=f"{train_scenes}-{test_scenes}", version="1.0.0", train_scenes=train_scenes, test_scenes=test_scenes
    )
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    builder = DigitsVQA(data_dir=folder, config=config, file_format="array_record")
    builder.download_and_prepare()  # writes aside and renames, so a data set is there whole or not at all
    return builder


def prepare_llava(
    folder: Path,
    json_file: Path,
    image_folder: Path,
    workers: int | None = None,
    *,
    max_bad: float = 0.0,
    any_suffix: bool = False,
) -> tfds.core.DatasetBuilder:
    """Pack the records of a json or jsonl file and their images below `folder`, unless they are there already.

    A file that changed is another data set. Raises InputError with every record that cannot be used, if they are more than the part
    `max_bad` of all; `any_suffix` as of `Packing`.
    """
    files = (llava.json_file(json_file),)
    packing = Packing(files, llava.image_folder_of(files, image_folder), max_bad, any_suffix)
    target = default_place(folder, packing)
    pack(packing, target, default_workers() if workers is None else workers)
    return tfds.builder_from_directory(target)


def default_place(folder: Path, packing: Packing) -> Path:
    """Where a packed data set is kept below `folder`; another place for other records."""
    return folder / NAME / f"{packing.files[0].stem}-{source_digest(packing)}" / VERSION
