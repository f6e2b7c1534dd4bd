"""Stages: what is frozen stays and costs nothing, and a run goes on in the right stage, at the right step."""

import dataclasses
import functools
import json
import shutil

import jax
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

import train
from configs import PRESETS
from ml_mamba_jax import checkpoint, sharding
from ml_mamba_jax.data.order import RandomOrder
from ml_mamba_jax.errors import InputError
from ml_mamba_jax.model import MLMamba
from ml_mamba_jax.training import plots
from ml_mamba_jax.training.cli import parse
from ml_mamba_jax.training.config import ALIGN, FINETUNE, FULL_FINETUNE, OptimConfig, StageConfig, TrainConfig
from ml_mamba_jax.training.initial import check_given
from ml_mamba_jax.training.losses import mean_loss_and_gradient
from ml_mamba_jax.training.optimizer import make_optimizer
from ml_mamba_jax.training.stages import Position, join, length, locate, split
from ml_mamba_jax.training.step import first_state, make_train_step
from ml_mamba_jax.training.stop import Stop
from ml_mamba_jax.training.watch import Watch
from tests import tiny_model
from tests.training.test_losses import make_batch

MODEL_CONFIG = tiny_model.MODEL.config
SMALL = MODEL_CONFIG.replace(
    language=dataclasses.replace(MODEL_CONFIG.language, n_layers=1),
    connector=dataclasses.replace(MODEL_CONFIG.connector, scan="none"),
    vision=(dataclasses.replace(MODEL_CONFIG.vision[0], depth=2),),
)
"""Every part of the model, of what compiles quickly."""
MODEL = MLMamba(SMALL)
OPTIM = OptimConfig(peak_lr=1e-2, warmup=0.0)


@pytest.fixture(scope="module")
def params() -> dict:
    return jax.jit(lambda: MODEL.init(jax.random.key(0), **MODEL.dummy_inputs()))()["params"]


def batch():
    whole = make_batch(8)
    return whole._replace(images={encoder.name: whole.images[encoder.name] for encoder in SMALL.vision})


def stage(trains, **changes) -> StageConfig:
    return StageConfig("one", trains=trains, optim=OPTIM, **changes)


def test_a_step_of_the_run_is_a_step_of_a_stage():
    lengths = (3, 1, 2)
    found = [locate(step, lengths) for step in range(7)]
    assert found == [(0, 0), (0, 1), (0, 2), (1, 0), (2, 0), (2, 1), (3, 0)]
    assert locate(0, (5,)) == Position(stage=0, step=0)


def test_epochs_are_counted_in_rows():
    assert length(stage(ALIGN, epochs=1.0, batch_size=256), RandomOrder(558_128, 256, 8, 0)) == 2181
    assert length(stage(ALIGN, epochs=2.0, batch_size=128), RandomOrder(665_298, 128, 8, 0)) == 10_396
    assert length(stage(ALIGN, epochs=0.5, batch_size=4), RandomOrder(16, 4, 8, 0)) == 2
    assert length(stage(ALIGN, epochs=1.0, batch_size=64), RandomOrder(3, 64, 8, 0)) == 1
    assert length(stage(ALIGN, steps=7, epochs=9.0), RandomOrder(1000, 64, 8, 0)) == 7


@pytest.mark.parametrize("trains", [ALIGN, FINETUNE, FULL_FINETUNE])
def test_split_and_join_lose_nothing(trains, params):
    trained, frozen = split(params, stage(trains))
    assert set(trained) == set(trains) and set(frozen) == set(params) - set(trains)
    jax.tree.map(np.testing.assert_array_equal, join(trained, frozen), params)


@pytest.mark.parametrize("trains", [ALIGN, FINETUNE])
def test_what_is_frozen_stays_and_has_no_moments(trains, params):
    mesh, one = sharding.make_mesh(1, 2, 1, devices=jax.devices()[:2]), stage(trains)
    place = sharding.param_shardings(MODEL, mesh)
    before = jax.tree.map(np.asarray, params)
    trained, frozen = split(jax.device_put(params, place), one)
    optimizer = make_optimizer(OPTIM, MODEL, 10)
    state = first_state(optimizer, trained, mesh)
    for moments in ("mu", "nu"):
        assert set(optax.tree_utils.tree_get(state.optimizer, moments)) == set(trains)
    state, metrics = make_train_step(MODEL, optimizer, mesh, one)(state, frozen, batch())
    assert metrics["finite"] == 1

    _, gradient, _ = jax.jit(lambda p: mean_loss_and_gradient(MODEL, p, batch()))(before)
    of_trained, _ = split(gradient, one)
    np.testing.assert_allclose(metrics["gradient_norm"], optax.tree.norm(of_trained), rtol=1e-4)
    after = flatten_dict(jax.tree.map(np.asarray, join(state.params, frozen)))
    for path, old in flatten_dict(before).items():
        assert np.array_equal(old, after[path]) == (path[0] not in trains), path
    assert not any(a.is_deleted() for a in jax.tree.leaves(frozen))


def test_nothing_is_computed_for_the_gradient_of_what_is_frozen(params):
    """Floating point operations of a gradient, as XLA counts them. Without the encoders' they are fewer by twice their forward
    pass, but for their first layer, whose input has no gradient; without those of the language model's weights by its forward."""
    rows = batch()

    def flops(trains) -> float:
        trained, frozen = split(params, stage(trains))
        gradient = jax.jit(lambda p, f: mean_loss_and_gradient(MODEL, p, rows, frozen=f)[1])
        return gradient.lower(trained, frozen).cost_analysis()["flops"]

    def forward_flops(*inputs, **method) -> float:
        return jax.jit(lambda p: MODEL.apply({"params": p}, *inputs, **method)).lower(params).cost_analysis()["flops"]

    encoders = forward_flops(rows.images, method="features")
    language = forward_flops(rows.tokens, method="hidden") * (1 + SMALL.n_visual_tokens / rows.tokens.shape[1])
    whole, finetune, align = (flops(trains) for trains in (FULL_FINETUNE, FINETUNE, ALIGN))
    assert 1.6 * encoders < whole - finetune < 2.2 * encoders
    assert 0.5 * language < finetune - align < 1.2 * language


def two_stages(folder, **changes) -> TrainConfig:
    recipe = PRESETS["digits-vqa"]
    data = dataclasses.replace(recipe.stages[0].data, folder=folder / "data", train_scenes=32, test_scenes=1)
    first = StageConfig("align", trains=ALIGN, data=data, optim=OPTIM, epochs=1.0, batch_size=8)
    second = StageConfig("finetune", trains=FINETUNE, data=data, optim=OPTIM, steps=5, batch_size=8)
    return TrainConfig(
        "two", SMALL, (first, second), from_scratch=True, save_every=3, keep=9, runs=folder / "runs", **changes
    )


def test_a_run_goes_on_in_the_stage_where_it_stood(tmp_path, monkeypatch, capsys):
    one_device = functools.partial(sharding.make_mesh, devices=jax.devices()[:1])
    monkeypatch.setattr(sharding, "make_mesh", one_device)
    monkeypatch.setattr(train, "evaluate", lambda run, params: None)
    monkeypatch.setattr(plots, "loss_curve", lambda lines, path: None)
    config = two_stages(tmp_path)
    train.train(config, Stop(), Watch(60.0))
    assert "stage 1 of 2, align: 4 steps of 8, trains connector: " in capsys.readouterr().out
    whole = config.runs / "two"
    assert checkpoint.steps(whole) == [3, 4, 6, 9]
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [line["stage"] for line in lines] == ["align"] * 4 + ["finetune"] * 5
    assert [line["step"] for line in lines] == list(range(1, 10))
    assert lines[4]["learning_rate"] == pytest.approx(OPTIM.peak_lr), "each stage has a schedule of its own"
    at_start, at_4, at_9 = (checkpoint.load_params(whole, step) for step in (3, 4, 9))
    jax.tree.map(np.testing.assert_array_equal, at_start["language"], at_4["language"])
    jax.tree.map(np.testing.assert_array_equal, at_4["vision"], at_9["vision"])
    assert not np.array_equal(at_4["language"]["embedding"], at_9["language"]["embedding"])

    for step in (3, 4, 6):  # within the first stage, between the two, within the second
        resumed = dataclasses.replace(config, runs=tmp_path / str(step), resume=True)
        shutil.copytree(whole, resumed.runs / "two")
        for later in [s for s in checkpoint.steps(whole) if s > step]:
            shutil.rmtree(resumed.runs / "two" / "checkpoints" / str(later))
        train.train(resumed, Stop(), Watch(60.0))
        assert f"resumed after step {step}" in capsys.readouterr().out
        again = (resumed.runs / "two" / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["loss"] for line in again] == [line["loss"] for line in lines]
        jax.tree.map(np.testing.assert_array_equal, checkpoint.load_params(resumed.runs / "two"), at_9)


def test_a_random_language_model_is_not_trained_by_accident(tmp_path):
    language_alone = MODEL_CONFIG.replace(vision=(), connector=None)
    checkpoint.write_model(tmp_path, language_alone, None)
    config = dataclasses.replace(two_stages(tmp_path), model=MODEL_CONFIG, from_scratch=False)
    with pytest.raises(InputError, match="no weights for language, vision/dinov2, vision/siglip, expected folders"):
        check_given(config)
    with pytest.raises(
        InputError, match=r"no weights for vision/dinov2, vision/siglip, .*--init FOLDER .*--from-scratch"
    ):
        check_given(dataclasses.replace(config, init=(tmp_path,)))
    check_given(dataclasses.replace(config, model=language_alone, init=(tmp_path,), tokenizer="its own"))
    check_given(dataclasses.replace(config, from_scratch=True))


def test_the_recipe_is_that_of_the_paper():
    """ML-Mamba, table 1 and section 4.1, and what the released code adds: decay 0 while aligning, 2,048 tokens, seed 7."""
    recipe = PRESETS["ml-mamba-3b"]
    found = {
        s.name: (
            s.trains,
            s.epochs,
            s.batch_size,
            s.optim.peak_lr,
            s.optim.weight_decay,
            s.data.form,
            s.data.max_tokens,
        )
        for s in recipe.stages
    }
    assert found == {
        "align": (("connector",), 1.0, 256, 1e-3, 0.0, "caption", 2048),
        "finetune": (("connector", "language"), 2.0, 64, 2e-5, 0.1, "chat", 2048),
    }
    for stage in recipe.stages:
        optim = stage.optim
        assert (optim.warmup, optim.clip_norm, optim.b1, optim.b2, optim.eps) == (0.03, 1.0, 0.9, 0.999, 1e-8)
    assert recipe.seed == 7 and not recipe.from_scratch
    assert PRESETS["ml-mamba-3b-1-epoch"].stages[1].epochs == 1.0
    (mix,) = PRESETS["ml-mamba-3b-1231k"].stages
    assert (mix.batch_size, mix.epochs, mix.data.json_file.name) == (128, 1.0, "llava_v1_5_lvis4v_lrv_mix1231k.json")


def test_options_of_a_stage_bear_its_name_where_there_are_several(tmp_path):
    presets = {"two": ("Two.", two_stages(tmp_path)), "one": ("One.", PRESETS["digits-vqa"])}
    two = parse(presets, ["two", "--align.steps", "3", "--finetune.optim.peak-lr", "5", "--seed", "4"])
    assert (two.stages[0].steps, two.stages[1].optim.peak_lr, two.seed) == (3, 5.0, 4)
    assert two.stages[1].steps == 5 and two.stages[0].name == "align"
    one = parse(presets, ["one", "--steps", "3", "--trains", "connector", "vision", "--optim.peak-lr=7"])
    assert (one.stages[0].steps, one.stages[0].trains, one.stages[0].optim.peak_lr) == (3, ("connector", "vision"), 7.0)
    assert parse(presets, ["one", "--steps", "None"]).stages[0].steps is None
    with pytest.raises(InputError, match=r"Unrecognized options: --steps.*did you mean --align\.steps"):
        parse(presets, ["two", "--steps", "3"])
