"""From the recipe of a stage to its batches: where records come from, and how they are put together."""

import dataclasses
import shutil

import pytest

from ml_mamba_jax.config import MLMambaConfig
from ml_mamba_jax.data.samples import n_images, n_positions
from ml_mamba_jax.data.shards import Packing, pack
from ml_mamba_jax.errors import InputError
from ml_mamba_jax.tokenizer import Tokenizer
from ml_mamba_jax.training.cli import parse
from ml_mamba_jax.training.config import DataConfig, StageConfig, TrainConfig, check
from ml_mamba_jax.training.inputs import open_batches, open_data, open_order, row_lengths
from ml_mamba_jax.training.stages import length
from tests.data.own_data import write_llava

TINY = MLMambaConfig.named("tiny")


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    file, images = write_llava(folder, 40)
    pack(Packing((file,), images), folder / "packed", workers=1)
    (images / "coco" / "0.jpg").write_bytes(b"")
    return folder


@pytest.mark.parametrize("batching", ["random", "grouped", "packed"])
def test_a_stage_reads_what_its_recipe_says(packed, batching):
    data = DataConfig(prepared=packed / "packed", batching=batching, max_tokens=64, buckets=2, row_length=160)
    stage = StageConfig("one", data=data, batch_size=4, epochs=2.0)
    source = open_data(data)["train"]
    tokenizer = Tokenizer.train(["What is 3? It is 3."], 300)
    order = open_order(stage, TINY, source, tokenizer, seed=3)
    stream = open_batches(stage, TINY, source, tokenizer, order, 0, length(stage, order))
    seen, read, pictures, lengths = [], 0, 0, set()
    for batch in stream:
        seen += stream.ids
        read, pictures = read + n_positions(batch, TINY), pictures + n_images(batch)
        visual = TINY.n_visual_tokens if batch.images and batch.image_starts is None else 0
        lengths.add(batch.tokens.shape[1] + visual)
    assert sorted(seen) == sorted(2 * [record.id for record in source])
    assert pictures == 2 * 30 and read > 2 * 40 * 20
    assert lengths <= set(row_lengths(data, TINY))


def test_one_place_of_records_is_asked_for(packed):
    with pytest.raises(InputError, match=r"data: got no records to learn from; pass --data\.prepared FOLDER"):
        open_data(DataConfig())
    with pytest.raises(InputError, match=r"found no dataset_info\.json, expected a prepared data set"):
        open_data(DataConfig(prepared=packed))


def test_bad_records_are_left_out_while_they_are_prepared(packed, tmp_path):
    """Of 40 records ten have the image that is broken; one more image has another suffix."""
    images = shutil.copytree(packed / "images", tmp_path / "images")
    (images / "coco" / "1.png").rename(images / "coco" / "1.webp")
    data = DataConfig(folder=tmp_path / "data", json_file=packed / "chat.json", image_folder=images)
    with pytest.raises(InputError, match="20 of 40 records cannot be used"):
        open_data(data)
    with pytest.raises(InputError, match=r"20 of 40 records cannot be used, more than the 30\.00%"):
        open_data(dataclasses.replace(data, max_bad=0.3))
    assert len(open_data(dataclasses.replace(data, max_bad=0.3, any_suffix=True))["train"]) == 30
    with pytest.raises(InputError, match="nowhere: found no such folder"):
        open_data(dataclasses.replace(data, image_folder=tmp_path / "nowhere"))


RECIPES = {"own": ("", TrainConfig("own", TINY, (StageConfig("one", data=DataConfig(max_tokens=30)),)))}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--data.prepared", "a", "--data.json-file", "b"), "data: got prepared and json_file, expected one of them"),
        (("--data.max-bad", "1.5"), r"data\.max_bad: got 1\.5, expected a part of the records"),
        (("--data.prepared", "a", "--data.image-folder", "b"), r"data\.image_folder: got one without json_file"),
        (("--data.any-suffix",), r"data\.any_suffix: got one without json_file"),
        (("--data.buckets", "0"), r"data\.buckets: got 0, expected at least 1"),
        (("--data.batching", "packet"), "batching"),
    ],
)
def test_what_cannot_be_is_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        check(parse(RECIPES, ["own", *arguments]))
