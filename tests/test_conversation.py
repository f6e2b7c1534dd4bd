"""A conversation that is interrupted, forked, reset or broken, and the empty answer."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from ml_mamba_jax import batching
from ml_mamba_jax.conversation import Chat
from ml_mamba_jax.decoding import pad_rows
from ml_mamba_jax.errors import InputError, NonFiniteError
from ml_mamba_jax.prompt import Turn
from ml_mamba_jax.tokenizer import Tokenizer
from tests.test_generate import TOKENIZER, printable_params, weights, with_language
from tests.tiny_model import MODEL, apply

BY_BYTE = Tokenizer.train([], 257)
six = functools.partial(Chat.ask, max_new_tokens=6)


def new_chat() -> Chat:
    return Chat(MODEL, printable_params(), BY_BYTE)


def begun(chat: Chat, question: str = "what is this?"):
    """An answer of which two pieces have come."""
    pieces = chat.stream(question, max_new_tokens=6)
    return pieces, next(pieces) + next(pieces)


def assert_state_is_that_of_what_was_read(chat: Chat, params: dict) -> None:
    tokens, lengths = pad_rows([chat.ids], 0)
    _, state = apply(params, tokens, lengths=lengths, method="prefill")
    np.testing.assert_allclose(chat.state.ssm, state.ssm, atol=1e-4 * np.abs(state.ssm).max())


def test_the_next_question_ends_an_answer_that_is_still_being_written():
    chat, closed = new_chat(), new_chat()
    pieces, text = begun(chat)
    answer = six(chat, "and then")
    other, _ = begun(closed)
    other.close()
    assert answer == six(closed, "and then") and chat.turns == closed.turns and chat.ids == closed.ids
    assert chat.turns[1] == Turn("gpt", text)
    turns = list(chat.turns)
    assert list(pieces) == []  # it has nothing more to say, and nothing to overwrite
    del pieces
    assert chat.turns == turns
    assert_state_is_that_of_what_was_read(chat, printable_params())


def test_reset_and_fork_end_it_too():
    chat = new_chat()
    pieces, _ = begun(chat)
    chat.reset()
    assert list(pieces) == [] and chat.turns == [] and chat.state is None

    pieces, text = begun(chat)
    other = chat.fork()
    assert chat.turns == other.turns == [Turn("human", "what is this?"), Turn("gpt", text)]
    six(other, "and then")
    assert list(pieces) == [] and len(chat.turns) == 2 and len(other.turns) == 4
    running, _ = begun(chat, "why so?")
    six(other, "go on")  # does not touch what another conversation writes
    assert len("".join(running)) == 4 and len(chat.turns) == 4


def test_nan_leaves_the_conversation_as_it_was():
    table, letter = weights()["language"]["embedding"], TOKENIZER.encode("h")[0]
    broken = with_language(embedding=table.at[letter].set(jnp.nan), head=table.T)  # which can write the letter
    no_letter = {"max_new_tokens": 4, "stop_ids": [letter]}
    chat = Chat(MODEL, broken, TOKENIZER)
    chat.ask("a cat?", **no_letter)
    turns, ids = list(chat.turns), list(chat.ids)
    with pytest.raises(NonFiniteError, match=r"^Chat: got NaN"):
        chat.ask("h", max_new_tokens=4)
    assert chat.turns == turns and chat.ids == ids and jnp.isfinite(chat.state.ssm).all()
    with pytest.raises(InputError):
        chat.ask("a", "nowhere.png")
    assert chat.turns == turns
    chat.ask("a cat?", **no_letter)
    assert len(chat.turns) == len(turns) + 2


def test_an_empty_answer_is_read_as_the_conversation_from_scratch_has_it():
    chat = new_chat()
    assert chat.ask("what is this?", max_new_tokens=4, stop_ids=range(257)) == ""
    assert six(chat, "and then")
    scratch = batching.encode_turns(BY_BYTE, chat.turns[:3])
    assert chat.ids == [*scratch, *chat.answer_ids]
    assert_state_is_that_of_what_was_read(chat, printable_params())
