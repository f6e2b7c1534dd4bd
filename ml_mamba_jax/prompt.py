"""Conversations as text: the Zephyr chat format of ML-Mamba, the one place that knows it.

    <|user|>\\n{question}<|endoftext|>\\n<|assistant|>\\n{answer}<|endoftext|>\\n<|user|>\\n...

A conversation becomes pieces, one for each turn. Each piece is tokenised on its own, so which tokens are answers is known by
construction and never recovered by searching. `<image>` marks in a question are dropped: the visual tokens stand before all text.
"""

from collections.abc import Sequence
from typing import NamedTuple

END_OF_TEXT = "<|endoftext|>"
IMAGE_MARK = "<image>"


class Turn(NamedTuple):
    """What one side said. `role` is "human" or "gpt"."""

    role: str
    text: str


class Piece(NamedTuple):
    """Text of one turn with its marks. `is_target`: the model learns to write it."""

    text: str
    is_target: bool


def without_mark(text: str) -> str:
    """What a human turn says, without the image mark and white space around it."""
    return text.replace(IMAGE_MARK, "").strip()


def render(turns: Sequence[Turn]) -> list[Piece]:
    """The pieces of a conversation that alternates human and gpt, human first.

    Raises:
        ValueError: no turns, or turns that do not alternate.
    """
    if not turns:
        raise ValueError("conversation: got no turns, expected a human turn first")
    pieces = []
    for i, (role, text) in enumerate(turns):
        expected = ("human", "gpt")[i % 2]
        if role != expected:
            raise ValueError(
                f"turn {i}: got role {role!r}, expected {expected!r} (human and gpt alternate, human first)"
            )
        text = without_mark(text)
        if role == "human":
            start = "\n" if i else ""
            pieces.append(Piece(f"{start}<|user|>\n{text}{END_OF_TEXT}\n<|assistant|>\n", is_target=False))
        else:
            pieces.append(Piece(f"{text or ' '}{END_OF_TEXT}", is_target=True))
    return pieces


def prompt(turns: str | Sequence[Turn]) -> str:
    """The text after which the model writes its answer to a question, or to a conversation that ends with a human turn.

    Raises:
        ValueError: as `render`, or a conversation that does not end with a human turn.
    """
    turns = [Turn("human", turns)] if isinstance(turns, str) else turns
    pieces = render(turns)
    if pieces[-1].is_target:
        raise ValueError("conversation: got a gpt turn last, expected a human turn for the model to answer")
    return "".join(piece.text for piece in pieces)
