"""Data sets on disk: tfds builders that write records to array_record files, without TensorFlow.

`DigitsVQA` composes the demo's scenes; `LlavaFolder` packs a LLaVA json file and its images. Both write the same features, and
`ml_mamba_jax.data.source` reads what either wrote. Images are stored as the encoded bytes of their files, empty for text alone.
"""

import dataclasses
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from ml_mamba_jax.data import scenes
from ml_mamba_jax.data.records import Record, parse_conversation
from ml_mamba_jax.errors import InputError
from ml_mamba_jax.image import read_file, read_image
from ml_mamba_jax.prompt import IMAGE_MARK, Turn

TURNS = 2
"""Questions in a training conversation: with more of them, the answers before would give away the next."""


class RecordBuilder(tfds.core.GeneratorBasedBuilder):
    """What all builders share: the features of a record, and how they are prepared."""

    BUILDER_CONFIGS = []  # noqa: RUF012, tfds wants a list

    def _info(self) -> tfds.core.DatasetInfo:
        turn = {"from": tfds.features.Text(), "value": tfds.features.Text()}
        features = {
            "id": tfds.features.Text(),
            "image": tfds.features.Text(),
            "conversations": tfds.features.Sequence(turn),
            "kind": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(
            builder=self, description=type(self).__doc__, features=tfds.features.FeaturesDict(features)
        )

    def _generate_examples(self, records: Iterator[Record]):
        for record in records:
            yield (
                record.id,
                {
                    "id": record.id,
                    "image": record.image or b"",
                    "conversations": [{"from": turn.role, "value": turn.text} for turn in record.turns],
                    "kind": record.kind,
                },
            )


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


@dataclasses.dataclass(eq=False, kw_only=True)
class LlavaConfig(tfds.core.BuilderConfig):
    """`json_file` lists the records, their image paths are relative to `image_folder`."""

    json_file: Path
    image_folder: Path


class LlavaFolder(RecordBuilder):
    """Records of a json file in LLaVA's form, with the images that they name."""

    name = "llava_folder"

    def _split_generators(self, dl_manager):
        config = self.builder_config
        return {"train": self._generate_examples(_read_llava(config.json_file, config.image_folder))}


def _read_llava(json_file: Path, image_folder: Path) -> Iterator[Record]:
    """All records of the file. Every image is decoded once, and all problems are reported together.

    Raises:
        InputError: an unreadable file, or one line for each record that cannot be used.
    """
    try:
        entries = json.loads(json_file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{json_file}: cannot read the records: {error}") from error
    if not isinstance(entries, list) or not entries:
        raise InputError(f"{json_file}: got no list of records, expected the LLaVA form (a list of objects)")
    problems = []
    for i, entry in enumerate(entries):
        try:
            yield _llava_record(entry, f"{json_file.name}[{i}]", image_folder, i)
        except InputError as error:
            problems.append(str(error))
    if problems:
        shown = "\n  ".join(problems[:50])
        more = f"\n  ... and {len(problems) - 50} more" if len(problems) > 50 else ""
        raise InputError(
            f"{json_file}: {len(problems)} of {len(entries)} records cannot be used; mend or remove them:\n  {shown}{more}"
        )


def _llava_record(entry, name: str, image_folder: Path, i: int) -> Record:
    if not isinstance(entry, dict):
        raise InputError(f"{name}: got {type(entry).__name__}, expected an object")
    turns = parse_conversation(entry.get("conversations"), name)
    image = None
    if "image" in entry:
        if not isinstance(entry["image"], str):
            raise InputError(f"{name}: image: got {type(entry['image']).__name__}, expected a path")
        path = image_folder / entry["image"]
        image = read_file(path)
        read_image(image, str(path))  # only for its checks: what is stored are the bytes of the file
    return Record(f"{i:08d}-{entry.get('id', '')}", image, turns)


def prepare_digits(folder: Path, train_scenes: int, test_scenes: int) -> tfds.core.DatasetBuilder:
    """Write the demo's scenes below `folder`, unless they are there already."""
    config = DigitsConfig(
        name=f"{train_scenes}-{test_scenes}", version="1.0.0", train_scenes=train_scenes, test_scenes=test_scenes
    )
    return _prepare(DigitsVQA, folder, config)


def prepare_llava(folder: Path, json_file: Path, image_folder: Path) -> tfds.core.DatasetBuilder:
    """Pack a LLaVA json file and its images below `folder`, unless these are there already.

    A json file that changed is another data set. Raises InputError with every record that cannot be used.
    """
    if not json_file.is_file():
        raise InputError(f"{json_file}: found no such file, expected a json list of records in the LLaVA form")
    digest = hashlib.sha256(json_file.read_bytes() + str(image_folder.resolve()).encode()).hexdigest()[:12]
    config = LlavaConfig(
        name=f"{json_file.stem}-{digest}", version="1.0.0", json_file=json_file, image_folder=image_folder
    )
    return _prepare(LlavaFolder, folder, config)


def _prepare(builder_class, folder: Path, config: tfds.core.BuilderConfig) -> tfds.core.DatasetBuilder:
    """tfds writes aside and renames, so a data set is there whole or not at all."""
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    builder = builder_class(data_dir=folder, config=config, file_format="array_record")
    builder.download_and_prepare()
    return builder
