"""The prompt formats, against the strings of the reference implementation."""

import typing

import pytest

from ml_mamba_jax.config import MLMambaConfig
from ml_mamba_jax.errors import InputError
from ml_mamba_jax.prompt import FORMATS, Piece, Turn, prompt, render, render_caption, render_question

TWO_TURNS = [Turn("human", "<image>\nQ1"), Turn("gpt", "A1"), Turn("human", " Q2 "), Turn("gpt", "A2")]


STRINGS = {
    "zephyr": (
        "<|user|>\nQ1<|endoftext|>\n<|assistant|>\n",
        "A1<|endoftext|>",
        "\n<|user|>\nQ2<|endoftext|>\n<|assistant|>\n",
        "A2<|endoftext|>",
    ),
    "mamba": ("In: Q1\nOut: ", "A1<|endoftext|>", "\nIn: Q2\nOut: ", "A2<|endoftext|>"),
    "pure": ("In: Q1\nOut: ", "A1</s>", "In: Q2\nOut: ", "A2</s>"),
}


@pytest.mark.parametrize("format", STRINGS)
def test_two_turns_are_the_reference_strings(format):
    pieces = render(TWO_TURNS, format)
    assert tuple(piece.text for piece in pieces) == STRINGS[format]
    assert [piece.is_target for piece in pieces] == [False, True, False, True]
    assert prompt(TWO_TURNS[:3], format) == "".join(STRINGS[format][:3])
    assert prompt("<image>\nQ1", format) == STRINGS[format][0]


def test_the_default_is_zephyr_and_a_config_can_name_every_format():
    assert render(TWO_TURNS) == render(TWO_TURNS, "zephyr")
    assert MLMambaConfig.named("ml-mamba-3b").prompt_format == "zephyr"
    assert typing.get_args(typing.get_type_hints(MLMambaConfig)["prompt_format"]) == tuple(FORMATS) == tuple(STRINGS)


def test_an_unknown_format_gets_a_suggestion():
    for call in (render, prompt, render_question, lambda _, format: render_caption("a cat", format)):
        with pytest.raises(InputError, match="unknown prompt format 'zephir'; did you mean 'zephyr'"):
            call(TWO_TURNS[:1], "zephir")


def test_braces_and_marks_in_a_text_are_text():
    assert render([Turn("human", "{} {0} {x}"), Turn("gpt", "{}")], "mamba") == [
        Piece("In: {} {0} {x}\nOut: ", False),
        Piece("{}<|endoftext|>", True),
    ]
    assert prompt("a <image>cat<image>", "pure") == "In: a cat\nOut: "


@pytest.mark.parametrize("format, end", [("zephyr", "<|endoftext|>"), ("mamba", "<|endoftext|>"), ("pure", "</s>")])
def test_a_caption_is_learnt_whole(format, end):
    assert render_caption(" a cat on\na mat\n", format) == [Piece("a cat on\na mat" + end, True)]


@pytest.mark.parametrize("format", STRINGS)
def test_an_empty_answer_is_a_space(format):
    for text in ("", " \n", "<image>"):
        assert render([Turn("human", "Q"), Turn("gpt", text)], format)[1].text == " " + FORMATS[format].end


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
