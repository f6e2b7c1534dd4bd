"""Scenes of real handwritten digits, with questions and answers about them.

The digits are the 1,797 of the UCI set "Optical Recognition of Handwritten Digits" (8 x 8 pixels, 16 grey levels) that ships inside
scikit-learn. A scene shows one to four of them in the corners of a grid. Held-out scenes are drawn from digits that no training
scene contains.
"""

import io
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from ml_mamba_jax.errors import InputError

SIDE = 64
"""Pixels of a scene's side."""
SMALLEST = 0.8
"""Size of the smallest digits, as a part of their cell."""
HELD_OUT = 0.2
"""Part of the digits, the same of each class, that only held-out scenes show."""

N_DIGITS = (1, 2, 3, 4, 2, 3, 4)
"""How many digits scenes show, taking turns. Single ones are learnt soon, so they are fewer."""

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CORNERS = ("top left", "top right", "bottom left", "bottom right")

_SINGLE = ("Which digit is this?", "What digit do you see?", "Which digit is written here?")
_PARITY = ("Is the digit even?", "Is this digit an even number?")
_POSITION = ("Which digit is at the {}?", "What is the digit at the {}?")
_PRESENCE = ("Is there a {}?", "Do you see a {}?")


class Digits(NamedTuple):
    """`images` uint8 [n 8 8] with ink white on black, `labels` int [n]."""

    images: np.ndarray
    labels: np.ndarray


class Question(NamedTuple):
    kind: str
    question: str
    answer: str


class Scene(NamedTuple):
    """`png` is the encoded picture, `digits` the indices of its digits in the set, `corners` where they stand in `CORNERS`."""

    png: bytes
    digits: tuple[int, ...]
    corners: tuple[int, ...]
    questions: tuple[Question, ...]


def load_digits() -> Digits:
    """The 1,797 digits. Raises InputError where scikit-learn is not installed."""
    try:
        from sklearn.datasets import load_digits as load
    except ImportError as error:
        raise InputError("the digits need scikit-learn: pip install 'ml-mamba-jax[demo]'") from error
    data = load()
    return Digits((data.images * (255 / 16)).round().astype(np.uint8), data.target.astype(np.int64))


def split_digits(labels: np.ndarray, seed: int = 0) -> dict[str, np.ndarray]:
    """Indices of the digits for "train" and "test", disjoint, with `HELD_OUT` of each class in test."""
    rng = np.random.default_rng(seed)
    test = []
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        test.append(members[: round(HELD_OUT * len(members))])
    test = np.sort(np.concatenate(test))
    return {"train": np.setdiff1d(np.arange(len(labels)), test), "test": test}


def scenes(digits: Digits, members: np.ndarray, n_scenes: int, seed: int) -> Iterator[Scene]:
    """`n_scenes` scenes of the digits with indices `members`."""
    rng = np.random.default_rng(seed)
    for i in range(n_scenes):
        n_digits = N_DIGITS[i % len(N_DIGITS)]
        chosen = rng.choice(members, n_digits)
        corners = np.sort(rng.permutation(len(CORNERS))[:n_digits])
        labels = digits.labels[chosen]
        questions = _about_one(labels, rng) if n_digits == 1 else _about_several(labels, corners, rng)
        png = _encode_png(_draw(digits.images[chosen], corners, rng))
        yield Scene(png, tuple(chosen.tolist()), tuple(corners.tolist()), questions)


def _about_one(labels: np.ndarray, rng: np.random.Generator) -> tuple[Question, ...]:
    (label,) = labels
    return (
        Question("single_digit", _pick(_SINGLE, rng), str(label)),
        Question("parity", _pick(_PARITY, rng), "Yes" if label % 2 == 0 else "No"),
        *_about_presence(labels, rng),
    )


def _about_several(labels: np.ndarray, corners: np.ndarray, rng: np.random.Generator) -> tuple[Question, ...]:
    positions = [
        Question("position", _pick(_POSITION, rng).format(CORNERS[corner]), str(label))
        for corner, label in zip(corners, labels, strict=True)
    ]
    return (*positions, *_about_presence(labels, rng))


def _about_presence(labels: np.ndarray, rng: np.random.Generator) -> tuple[Question, ...]:
    """Two questions: about a digit that is there, and about one that is not."""
    asked = {"Yes": rng.choice(labels), "No": rng.choice(np.setdiff1d(np.arange(10), labels))}
    return tuple(
        Question("presence", _pick(_PRESENCE, rng).format(WORDS[label]), answer) for answer, label in asked.items()
    )


def _draw(images: np.ndarray, corners: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """uint8 [SIDE SIDE]: digits in cells of a 2 x 2 grid, each a little shifted, scaled and turned."""
    from PIL import Image

    cell = SIDE // 2
    canvas = Image.new("L", (SIDE, SIDE))
    for image, corner in zip(images, corners, strict=True):
        size = round(cell * rng.uniform(SMALLEST, 1.0))
        digit = Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC)
        digit = digit.rotate(rng.uniform(-10, 10), Image.Resampling.BICUBIC)
        row, column = divmod(int(corner), 2)
        left, top = (start * cell + int(rng.integers(cell - size + 1)) for start in (column, row))
        canvas.paste(digit, (left, top))
    return np.asarray(canvas)


def _encode_png(picture: np.ndarray) -> bytes:
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(picture).convert("RGB").save(stream, format="PNG")
    return stream.getvalue()


def _pick(texts: tuple[str, ...], rng: np.random.Generator) -> str:
    return texts[rng.integers(len(texts))]
