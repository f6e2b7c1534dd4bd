"""The time of an answer: to the first token, of compiling, and a token after the other."""

import pytest

from ml_mamba_jax.conversation import Chat
from ml_mamba_jax.generation import generate, stream
from ml_mamba_jax.timing import Timing
from tests.test_generate import TOKENIZER, weights
from tests.tiny_model import MODEL

OPTIONS = {"max_new_tokens": 11, "stop_ids": ()}


def asked(timing: Timing, how: str) -> None:
    if how == "generate":
        generate(MODEL, weights(), TOKENIZER, ["hi", "a cat?"], timing=timing, **OPTIONS)
    elif how == "stream":
        list(stream(MODEL, weights(), TOKENIZER, "hi", timing=timing, **OPTIONS))
    else:
        Chat(MODEL, weights(), TOKENIZER).ask("hi", timing=timing, **OPTIONS)


@pytest.mark.parametrize(("how", "tokens"), [("generate", 22), ("stream", 11), ("chat", 11)])
def test_an_answer_is_timed(how, tokens):
    timing = Timing()
    for first_time in (True, False):
        asked(timing, how)
        assert timing.tokens == tokens  # not added to those of the call before
        assert 0 < timing.first_token < timing.seconds < 300
        if not first_time:
            assert timing.compiling == 0
            assert "compiling" not in str(timing)
    assert str(timing).startswith(f"{tokens} tokens in {timing.seconds:.2f} s; first token after ")


def test_compiling_is_told():
    timing, odd = Timing(), {"max_new_tokens": 11, "stop_ids": (7, 9, 11)}  # which nothing else compiles
    generate(MODEL, weights(), TOKENIZER, ["hi"], timing=timing, **odd)
    assert 0.01 < timing.compiling < timing.seconds
    assert str(timing).endswith(f"; {timing.compiling:.2f} s of it compiling")


def test_the_rate_is_that_of_the_tokens_after_the_first():
    timing = Timing()
    timing.seconds, timing.first_token, timing.tokens, timing.rows = 3.0, 1.0, 42, 2
    assert str(timing) == "42 tokens in 3.00 s; first token after 1.00 s, then 20.0 tokens/s"
    timing.tokens = 2
    assert str(timing) == "2 tokens in 3.00 s; first token after 1.00 s"
