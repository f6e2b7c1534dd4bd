"""Scores and their baselines, against numbers counted by hand; the pictures are written and can be opened."""

import io

import numpy as np
import pytest
from PIL import Image

from ml_mamba_jax.config import MLMambaConfig
from ml_mamba_jax.data.records import Record
from ml_mamba_jax.errors import InputError
from ml_mamba_jax.model import MLMamba
from ml_mamba_jax.prompt import Turn
from ml_mamba_jax.tokenizer import Tokenizer
from ml_mamba_jax.training import evals, plots
from ml_mamba_jax.training.evals import Answer, answer, score, table


def png() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), "white").save(stream, format="PNG")
    return stream.getvalue()


def made(kind: str, expected: str, prediction: str) -> Answer:
    turns = (Turn("human", "<image>\nWhich?"), Turn("gpt", expected))
    return Answer(Record("id", png(), turns, kind), prediction)


ANSWERS = [
    *[made("digit", "7", "7 "), made("digit", "7", "1"), made("digit", "3", "3"), made("digit", "1", "7")],
    *[made("parity", "Yes", "Yes"), made("parity", "No", "no")],
]


MODEL = (MLMamba(MLMambaConfig.named("tiny")), {}, Tokenizer.train([], 257))


def test_scores_are_counted_by_kind():
    scores = score(ANSWERS)
    assert scores["digit"] == (0.5, 4, 0.5)
    assert scores["parity"] == (0.5, 2, 0.5)
    assert list(scores) == ["overall", "digit", "parity"]
    assert scores["overall"] == (pytest.approx(3 / 6), 6, pytest.approx(3 / 6))
    assert "50.0%" in table(scores)
    assert table(scores).count("\n") == 3


def test_a_caption_is_asked_for_by_its_image_alone(monkeypatch):
    """Text without an image asks for nothing, and what is said stays with its record."""
    asked = []

    def generate(model, params, tokenizer, prompts, images, max_new_tokens):
        asked.append((prompts, len(images), max_new_tokens))
        return [f"caption {i}" for i in range(len(images))]

    monkeypatch.setattr(evals, "generate", generate)
    records = [made("", str(i), "").record for i in range(5)]
    records[1] = records[1]._replace(image=None)
    options = {"batch_size": 2, "max_new_tokens": 9}
    found = answer(*MODEL, records, form="caption", **options)
    assert [item.prediction for item in found] == ["caption 0", "", "caption 0", "caption 1", "caption 0"]
    assert [item.record for item in found] == records
    assert asked == [(None, 2, 9)] * 3
    answer(*MODEL, records[:2], **options)
    assert asked[-1] == ([record.turns[:1] for record in records[:2]], 2, 9)
    records[0] = records[0]._replace(image=b"no image")
    with pytest.raises(InputError, match="id: cannot decode the image"):
        answer(*MODEL, records[:2], **options)
    found = answer(*MODEL, records[:2], skip=True, **options)
    assert [item.prediction for item in found] == ["", "caption 0"]


def test_a_better_model_scores_higher():
    right = [item._replace(prediction=item.expected) for item in ANSWERS]
    assert score(right)["overall"].accuracy == 1
    assert score(right)["overall"].majority_baseline == score(ANSWERS)["overall"].majority_baseline


def test_pictures_are_written_whole(tmp_path):
    lines = [{"step": i, "loss": 2.0 / i, "learning_rate": 1e-3} for i in range(1, 30)]
    plots.loss_curve(lines, tmp_path / "loss.png")
    plots.answer_grid(ANSWERS, tmp_path / "samples.png", columns=3, rows=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loss.png", "samples.png"]
    for path in tmp_path.iterdir():
        pixels = np.asarray(Image.open(io.BytesIO(path.read_bytes())).convert("RGB"))
        assert pixels.shape[0] > 200
        assert pixels.std() > 5, f"{path.name} is empty"
