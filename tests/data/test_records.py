"""The LLaVA conversation form: what is read, what is refused and how it is named."""

import pytest

from ml_mamba_jax.data.records import parse_conversation
from ml_mamba_jax.errors import InputError
from ml_mamba_jax.prompt import Turn

HUMAN, GPT = {"from": "human", "value": "<image>\nQ"}, {"from": "gpt", "value": "A"}


def test_turns_are_kept_as_they_are():
    assert parse_conversation([HUMAN, GPT], "r") == (Turn("human", "<image>\nQ"), Turn("gpt", "A"))


@pytest.mark.parametrize(
    "conversations, message",
    [
        (None, "r7: conversations: got NoneType, expected a list"),
        ("text", "r7: conversations: got str, expected a list"),
        ([], "r7: conversations: got an empty list"),
        ([HUMAN], "r7: conversations: got no gpt turn"),
        ([GPT, HUMAN], r"r7: conversations\[0\]\.from: got 'gpt', expected 'human'"),
        ([HUMAN, HUMAN], r"r7: conversations\[1\]\.from: got 'human', expected 'gpt'"),
        ([HUMAN, "A"], r"r7: conversations\[1\]: got str, expected an object"),
        ([HUMAN, {"from": "gpt"}], r"r7: conversations\[1\]\.value: got nothing, expected text"),
        ([HUMAN, {"from": "gpt", "value": 7}], r"r7: conversations\[1\]\.value: got int, expected text"),
    ],
)
def test_what_is_wrong_is_named(conversations, message):
    with pytest.raises(InputError, match=message):
        parse_conversation(conversations, "r7")
