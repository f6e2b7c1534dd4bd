"""The chat format, against the strings of the reference implementation."""

import pytest

from ml_mamba_jax.prompt import Piece, Turn, prompt, render

TWO_TURNS = [Turn("human", "<image>\nQ1"), Turn("gpt", "A1"), Turn("human", " Q2 "), Turn("gpt", "A2")]


def test_two_turns_are_the_reference_string():
    text = "".join(piece.text for piece in render(TWO_TURNS))
    assert text == (
        "<|user|>\nQ1<|endoftext|>\n<|assistant|>\nA1<|endoftext|>"
        "\n<|user|>\nQ2<|endoftext|>\n<|assistant|>\nA2<|endoftext|>"
    )


def test_only_answers_are_targets():
    assert [piece.is_target for piece in render(TWO_TURNS)] == [False, True, False, True]
    assert render(TWO_TURNS)[1] == Piece("A1<|endoftext|>", True)


def test_an_empty_answer_is_a_space():
    assert render([Turn("human", "Q"), Turn("gpt", "")])[1].text == " <|endoftext|>"


def test_prompt_of_a_question_and_of_a_conversation():
    assert prompt("Q1") == "<|user|>\nQ1<|endoftext|>\n<|assistant|>\n"
    assert prompt(TWO_TURNS[:3]) == "".join(piece.text for piece in render(TWO_TURNS))[: -len("A2<|endoftext|>")]


@pytest.mark.parametrize(
    "turns, message",
    [
        ([], "got no turns"),
        ([Turn("gpt", "A")], "turn 0: got role 'gpt', expected 'human'"),
        ([Turn("human", "Q"), Turn("human", "Q")], "turn 1: got role 'human', expected 'gpt'"),
    ],
)
def test_turns_that_do_not_alternate_are_refused(turns, message):
    with pytest.raises(ValueError, match=message):
        render(turns)


def test_a_prompt_must_end_with_a_question():
    with pytest.raises(ValueError, match="got a gpt turn last"):
        prompt(TWO_TURNS)
