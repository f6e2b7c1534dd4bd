"""The log of a run survives a kill and a resumed run."""

import dataclasses

import pytest

from configs import PRESETS
from ml_mamba_jax.errors import InputError
from ml_mamba_jax.training.config import check
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


@pytest.mark.parametrize("field, value", [("steps", 0), ("batch_size", -1), ("name", "a/b"), ("name", "")])
def test_numbers_that_no_run_can_have_are_refused(field, value):
    with pytest.raises(InputError, match=f"{field}: got"):
        check(dataclasses.replace(PRESETS["digits-vqa"], **{field: value}))


@pytest.mark.parametrize("field, value", [("train_scenes", 0), ("test_scenes", 0), ("workers", -1), ("max_tokens", 0)])
def test_numbers_that_no_data_can_have_are_refused(field, value):
    recipe = PRESETS["digits-vqa"]
    with pytest.raises(InputError, match=rf"data\.{field}: got {value}"):
        check(dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, **{field: value})))
