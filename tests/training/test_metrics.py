"""The log of a run survives a kill and a resumed run."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest

from configs import PRESETS, RECIPES
from ml_mamba_jax.errors import InputError
from ml_mamba_jax.training.config import TrainConfig, check
from ml_mamba_jax.training.flops import step_flops
from ml_mamba_jax.training.loop import work_of
from ml_mamba_jax.training.metrics import MetricsLog, Progress, Work, read_metrics
from ml_mamba_jax.training.profiling import ProfileWindow
from tests.training.test_losses import make_batch


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
        progress.update(step, float(step), Work(seconds=0.5, waited=0.01, tokens=1000, flops=10**9))
    progress.close()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[:2] for line in lines] == [
        ["step 10/25", "loss 5.5000"],
        ["step 20/25", "loss 15.5000"],
        ["step 25/25", "loss 23.0000"],
    ]
    assert all("  2,000 tokens/s  " in line and line.endswith("left") for line in lines)
    assert "MFU" not in lines[0] and "waits" not in lines[0]


def test_utilisation_and_waiting_are_those_since_the_last_line(capsys):
    progress = Progress(0, 4, log_every=2, peak=4e9)
    for step, waited in enumerate((0.0, 0.0, 0.5, 0.1), start=1):
        progress.update(step, 1.0, Work(seconds=1.0, waited=waited, tokens=10, flops=step * 10**9))
    lines = capsys.readouterr().out.splitlines()
    assert "MFU 37.5%" in lines[0] and "waits" not in lines[0]
    assert "MFU 87.5%  waits for data 30% of the time: raise data.workers" in lines[1]


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


def test_a_window_of_steps_is_profiled(tmp_path, capsys):
    window = ProfileWindow(tmp_path / "profile", (2, 3))
    for step in range(1, 6):
        window.before(step)
        (jnp.ones((8, 8)) @ jnp.ones((8, 8))).block_until_ready()
        assert (tmp_path / "profile").exists() == (step > 3), "written when the window is over"
    window.close()
    assert len(list((tmp_path / "profile").rglob("*.xplane.pb"))) == 1
    assert capsys.readouterr().out == f"profile of steps 2 to 3: {tmp_path / 'profile'}\n"
    nothing = ProfileWindow(tmp_path / "nothing", None)
    nothing.before(1)
    nothing.close()
    assert not (tmp_path / "nothing").exists()


def test_work_counts_no_padding():
    config = PRESETS["digits-vqa"].model
    stage, rows = PRESETS["digits-vqa"].stages[0], make_batch(4)
    batch = rows._replace(lengths=np.array([9, 9, 5, 2]), image_mask=np.array([True, False, False, True]))
    work = work_of(batch, config, stage, 2.0, 0.5)
    assert work.tokens == 25 + 2 * 16 and work.flops == step_flops(config, stage, images=2, tokens=25)
    assert work_of(batch._replace(image_mask=None), config, stage, 2.0, 0.5).tokens == 25 + 4 * 16
    assert work_of(batch._replace(images={}), config, stage, 2.0, 0.5).tokens == 25


@pytest.mark.parametrize(
    "field, value",
    [
        *[("steps", 0), ("batch_size", -1), ("name", "a/b"), ("name", ""), ("epochs", 0.0), ("micro_batches", 0)],
        *[("data.train_scenes", 0), ("data.test_scenes", 0), ("data.workers", -1), ("data.max_tokens", 0)],
        *[("profile", (3, 2)), ("device_memory", 0.0), ("peak_tflops", -1.0), ("eval_every", 0), ("eval_records", 0)],
        *[("trains", ()), ("optim.peak_lr", 0.0), ("optim.warmup", 1.0), ("stages", ()), ("epochs", math.inf)],
        *[("optim.b1", 1.0), ("optim.b2", -0.1), ("optim.eps", 0.0), ("optim.clip_norm", 0.0), ("eval_new_tokens", 0)],
        *[("optim.weight_decay", -1.0), ("optim.weight_decay", math.nan), ("optim.peak_lr", math.inf)],
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
