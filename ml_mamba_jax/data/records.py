"""A record: one image and a conversation about it, in the form of LLaVA's data sets.

{"id": "000123", "image": "coco/000123.jpg",
 "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"}, {"from": "gpt", "value": "A cat."}, ...]}
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ml_mamba_jax.errors import InputError
from ml_mamba_jax.prompt import Turn


class Record(NamedTuple):
    """`image` is an encoded file, or None for text alone. `kind` groups questions in an evaluation, and may be empty."""

    id: str
    image: bytes | None
    turns: tuple[Turn, ...]
    kind: str = ""


def parse_conversation(conversations: Any, name: str) -> tuple[Turn, ...]:
    """Check a `conversations` list and turn it into turns that alternate human and gpt, human first.

    Raises:
        InputError: anything else; names the record, the turn and the field.
    """
    if not isinstance(conversations, Sequence) or isinstance(conversations, str | bytes):
        raise InputError(f"{name}: conversations: got {type(conversations).__name__}, expected a list of turns")
    if not conversations:
        raise InputError(
            f"{name}: conversations: got an empty list, expected a human turn and a gpt turn; remove the record"
        )
    turns = []
    for i, turn in enumerate(conversations):
        expected = ("human", "gpt")[i % 2]
        if not isinstance(turn, Mapping):
            raise InputError(
                f"{name}: conversations[{i}]: got {type(turn).__name__}, expected an object with from and value"
            )
        for field in ("from", "value"):
            if not isinstance(turn.get(field), str):
                got = type(turn[field]).__name__ if field in turn else "nothing"
                raise InputError(f"{name}: conversations[{i}].{field}: got {got}, expected text")
        if turn["from"] != expected:
            raise InputError(
                f"{name}: conversations[{i}].from: got {turn['from']!r}, expected {expected!r} (human and gpt alternate)"
            )
        turns.append(Turn(turn["from"], turn["value"]))
    if len(turns) < 2:
        raise InputError(
            f"{name}: conversations: got no gpt turn, expected an answer to learn; add one or remove the record"
        )
    return tuple(turns)
