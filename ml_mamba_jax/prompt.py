"""Conversations as text: the prompt formats of ML-Mamba and its ancestors, the one place that knows them.

`zephyr`, that of ML-Mamba:

    <|user|>\\n{question}<|endoftext|>\\n<|assistant|>\\n{answer}<|endoftext|>\\n<|user|>\\n...

A conversation becomes pieces, one for each turn. Each piece is tokenised on its own, so which tokens are answers is known by
construction and never recovered by searching. `<image>` marks in a question are dropped: the visual tokens stand before all text.
"""

from collections.abc import Sequence
from typing import NamedTuple

from ml_mamba_jax.errors import InputError
from ml_mamba_jax.names import unknown

END_OF_TEXT = "<|endoftext|>"
IMAGE_MARK = "<image>"


class Format(NamedTuple):
    """How turns are written: `question` around what a human says, `separator` before it from the second question on, `end`
    after each answer. The model stops where it writes `end`."""

    question: str
    separator: str
    end: str


FORMATS: dict[str, Format] = {
    "zephyr": Format("<|user|>\n{}" + END_OF_TEXT + "\n<|assistant|>\n", separator="\n", end=END_OF_TEXT),
    "mamba": Format("In: {}\nOut: ", separator="\n", end=END_OF_TEXT),
    "pure": Format("In: {}\nOut: ", separator="", end="</s>"),
}
"""The prompt formats by the name that a model's config gives (`MLMambaConfig.prompt_format`).

The original strips the space after `Out:` from a `pure` prompt when it generates, though not when it trains. Here a model is
asked in the very tokens that it was trained on.
"""


class Turn(NamedTuple):
    """What one side said. `role` is "human" or "gpt"."""

    role: str
    text: str


class Piece(NamedTuple):
    """Text of one turn with its marks. `is_target`: the model learns to write it."""

    text: str
    is_target: bool


def prompt_format(name: str) -> Format:
    """The format of that name. Raises InputError with the nearest name for an unknown one."""
    if name not in FORMATS:
        raise unknown("prompt format", name, FORMATS)
    return FORMATS[name]


def without_mark(text: str) -> str:
    """What a turn says, without the image mark and white space around it."""
    return text.replace(IMAGE_MARK, "").strip()


def render(turns: Sequence[Turn], format: str = "zephyr") -> list[Piece]:
    """The pieces of a conversation that alternates human and gpt, human first.

    Raises:
        InputError: no turns, turns that do not alternate or are none, or an unknown format.
    """
    question, separator, end = prompt_format(format)
    if not isinstance(turns, Sequence) or isinstance(turns, str):
        raise InputError(f"conversation: got {type(turns).__name__}, expected a list of turns")
    if not turns:
        raise InputError("conversation: got no turns, expected a human turn first")
    pieces = []
    for i, turn in enumerate(turns):
        if not isinstance(turn, tuple | list) or len(turn) != 2 or not isinstance(turn[1], str):
            raise InputError(f"turn {i}: got {turn!r}, expected Turn(role, text); a question alone is passed as a str")
        role, text = turn
        expected = ("human", "gpt")[i % 2]
        if role != expected:
            raise InputError(
                f"turn {i}: got role {role!r}, expected {expected!r} (human and gpt alternate, human first)"
            )
        text = without_mark(text)
        if role == "human":
            pieces.append(Piece((separator if i else "") + question.format(text), is_target=False))
        else:
            pieces.append(Piece((text or " ") + end, is_target=True))
    return pieces


def render_question(turns: str | Sequence[Turn], format: str = "zephyr") -> list[Piece]:
    """The pieces of a question, or of a conversation that ends with one, for the model to answer.

    Raises:
        InputError: as `render`, or a conversation that does not end with a human turn.
    """
    pieces = render([Turn("human", turns)] if isinstance(turns, str) else turns, format)
    if pieces[-1].is_target:
        raise InputError("conversation: got a gpt turn last, expected a human turn for the model to answer")
    return pieces


def render_caption(text: str, format: str = "zephyr") -> list[Piece]:
    """The one piece of an image's caption: learnt whole, without a question."""
    return [Piece(without_mark(text) + prompt_format(format).end, is_target=True)]


def prompt(turns: str | Sequence[Turn], format: str = "zephyr") -> str:
    """The text after which the model writes its answer; arguments and errors as of `render_question`."""
    return "".join(piece.text for piece in render_question(turns, format))
