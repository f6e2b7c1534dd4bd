"""The digit scenes: true answers, balanced questions, and no digit on both sides of the split."""

import re
from collections import Counter

import numpy as np
import pytest

from ml_mamba_jax.data import scenes
from ml_mamba_jax.image import read_image

DIGITS = scenes.load_digits()
SPLIT = scenes.split_digits(DIGITS.labels)


def sample(split: str, n: int, seed: int = 3) -> list[scenes.Scene]:
    return list(scenes.scenes(DIGITS, SPLIT[split], n, seed))


def test_the_split_has_every_digit_once_and_every_class_on_both_sides():
    assert len(DIGITS.labels) == 1797
    both = np.concatenate([SPLIT["train"], SPLIT["test"]])
    assert sorted(both) == list(range(1797))
    for label in range(10):
        held_out = np.mean(np.isin(np.flatnonzero(DIGITS.labels == label), SPLIT["test"]))
        assert abs(held_out - scenes.HELD_OUT) < 0.01


def test_scenes_show_only_digits_of_their_split():
    shown = {split: {i for scene in sample(split, 300) for i in scene.digits} for split in ("train", "test")}
    assert shown["train"] <= set(SPLIT["train"])
    assert shown["test"] <= set(SPLIT["test"])


def test_every_answer_is_true():
    for scene in sample("train", 200):
        labels = DIGITS.labels[list(scene.digits)]
        kinds = Counter(question.kind for question in scene.questions)
        expected = {"single_digit": 1, "parity": 1} if len(labels) == 1 else {"position": len(labels)}
        assert kinds == expected | {"presence": 2}
        for kind, question, answer in scene.questions:
            if kind == "single_digit":
                assert answer == str(labels[0])
            elif kind == "parity":
                assert answer == ("No" if labels[0] % 2 else "Yes")
            elif kind == "position":
                (corner,) = [c for c in scenes.CORNERS if c in question]
                row, column = corner.split()
                assert answer == str(labels[scene.corners.index(2 * (row == "bottom") + (column == "right"))])
            else:
                (word,) = [w for w in scenes.WORDS if re.search(rf"\b{w}\b", question)]
                assert answer == ("Yes" if scenes.WORDS.index(word) in labels else "No")


def test_presence_is_asked_evenly():
    answers = Counter(q.answer for s in sample("train", 100) for q in s.questions if q.kind == "presence")
    assert answers["Yes"] == answers["No"] == 100


def test_digits_stand_in_their_corners_and_nothing_elsewhere():
    for scene in sample("test", 60):
        picture = np.asarray(read_image(scene.png), float)[..., 0]
        assert picture.shape == (scenes.SIDE, scenes.SIDE)
        ink = [quarter.sum() for half in np.split(picture, 2) for quarter in np.split(half, 2, axis=1)]
        for corner in range(4):
            if corner not in scene.corners:
                assert ink[corner] == 0
                continue
            original = DIGITS.images[scene.digits[scene.corners.index(corner)]].astype(float).sum()
            # Scaled from 8 pixels to 0.8 to 1 of 32, the ink grows by (0.8 * 4)^2 to 4^2; turning cuts a little off.
            assert 0.8 * 10.24 < ink[corner] / original < 1.05 * 16


def test_the_same_seed_makes_the_same_scenes():
    assert sample("train", 6) == sample("train", 6)
    assert sample("train", 6)[0].png != sample("train", 6, seed=4)[0].png


def test_without_scikit_learn_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    with pytest.raises(scenes.InputError, match=r"pip install 'ml-mamba-jax\[demo\]'"):
        scenes.load_digits()
