"""The log of a run survives a kill and a resumed run."""

import dataclasses

import pytest

from configs import PRESETS, RECIPES
from ml_mamba_jax.errors import InputError
from ml_mamba_jax.training.config import TrainConfig, check
from ml_mamba_jax.training.metrics import MetricsLog, Progress, read_metrics


def test_a_resumed_log_has_every_step_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, 0)
    for step in range(1, 8):
        log.write(step, {"loss": float(step)})
    log.close()
    with path.open("a") as file:
        file.write('{"step": 8, "lo')  # killed in the middle of a line
    assert [line["step"] for line in read_metrics(path)] == list(range(1, 8))
    log = MetricsLog(path, 5)
    log.write(6, {"loss": 0.0})
    log.close()
    assert [(line["step"], line["loss"]) for line in read_metrics(path)] == [*((i, i) for i in range(1, 6)), (6, 0)]


def test_a_new_run_starts_a_new_log(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for _ in range(2):
        log = MetricsLog(path, 0)
        log.write(1, {"loss": 1.0})
        log.close()
    assert len(read_metrics(path)) == 1


def test_without_a_terminal_there_is_a_line_every_few_steps(capsys):
    progress = Progress(0, 25, log_every=10)
    for step in range(1, 26):
        progress.update(step, loss=float(step), tokens=1000)
    progress.close()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[:2] for line in lines] == [
        ["step 10/25", "loss 5.5000"],
        ["step 20/25", "loss 15.5000"],
        ["step 25/25", "loss 23.0000"],
    ]
    assert all("tokens/s" in line and line.endswith("left") for line in lines)


def changed(recipe: TrainConfig, path: str, value) -> TrainConfig:
    """The recipe with a field of it, or of its only stage or its data, set anew."""
    stage, name = recipe.stages[0], path.split(".")[-1]
    if path.startswith("data."):
        stage = dataclasses.replace(stage, data=dataclasses.replace(stage.data, **{name: value}))
    elif path.startswith("optim."):
        stage = dataclasses.replace(stage, optim=dataclasses.replace(stage.optim, **{name: value}))
    elif hasattr(recipe, name):
        return dataclasses.replace(recipe, **{name: value})
    else:
        stage = dataclasses.replace(stage, **{name: value})
    return dataclasses.replace(recipe, stages=(stage,))


@pytest.mark.parametrize(
    "field, value",
    [
        *[("steps", 0), ("batch_size", -1), ("name", "a/b"), ("name", ""), ("epochs", 0.0), ("micro_batches", 0)],
        *[("data.train_scenes", 0), ("data.test_scenes", 0), ("data.workers", -1), ("data.max_tokens", 0)],
        *[("trains", ()), ("optim.peak_lr", 0.0), ("optim.warmup", 1.0), ("stages", ())],
    ],
)
def test_numbers_that_no_run_can_have_are_refused(field, value):
    with pytest.raises(InputError, match=f"{field}: got"):
        check(changed(PRESETS["digits-vqa"], field, value))


def test_the_stage_is_named_where_there_are_several():
    recipe = PRESETS["ml-mamba-3b"]
    align, finetune = recipe.stages
    stages = (align, dataclasses.replace(finetune, batch_size=0))
    with pytest.raises(InputError, match=r"finetune\.batch_size: got 0"):
        check(dataclasses.replace(recipe, stages=stages))
    with pytest.raises(InputError, match="stages: got align, align, expected one or several of different names"):
        check(dataclasses.replace(recipe, stages=(align, align)))
    language_alone = dataclasses.replace(recipe, model=recipe.model.replace(vision=(), connector=None))
    with pytest.raises(InputError, match=r"align\.trains: got connector, expected .* parts: language"):
        check(language_alone)


@pytest.mark.parametrize("name", PRESETS)
def test_every_recipe_can_be_started(name):
    check(PRESETS[name])
    assert PRESETS[name].name == name and "." in RECIPES[name][0]
