"""Label masks and batches: exactly the answers are targets, padding is none."""

import dataclasses
import io

import numpy as np
import pytest
from PIL import Image

from ml_mamba_jax.config import MLMambaConfig
from ml_mamba_jax.data.records import Record
from ml_mamba_jax.data.samples import collate, make_sample, tokenize
from ml_mamba_jax.errors import InputError
from ml_mamba_jax.prompt import Turn
from ml_mamba_jax.tokenizer import Tokenizer

TINY = MLMambaConfig.named("tiny")
TOKENIZER = Tokenizer.train(["<|user|>\nWhich digit is this?\n<|assistant|>\n"] * 9, 300)
TURNS = (
    Turn("human", "<image>\nWhich digit is this?"),
    Turn("gpt", "7"),
    Turn("human", "Sure?"),
    Turn("gpt", "Yes, 7"),
)


def png(colour=(255, 0, 0)) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (40, 20), colour).save(stream, format="PNG")
    return stream.getvalue()


def test_the_targets_decode_to_the_answers_and_their_ends():
    tokens, is_target = tokenize(TURNS, TOKENIZER, 500, "r")
    assert tokens.dtype == np.int32
    spans = np.split(np.arange(len(tokens)), np.flatnonzero(np.diff(is_target)) + 1)
    texts = [TOKENIZER.backend.decode(tokens[span].tolist(), skip_special_tokens=False) for span in spans]
    assert texts == [
        "<|user|>\nWhich digit is this?<|endoftext|>\n<|assistant|>\n",
        "7<|endoftext|>",
        "\n<|user|>\nSure?<|endoftext|>\n<|assistant|>\n",
        "Yes, 7<|endoftext|>",
    ]
    assert [bool(is_target[span[0]]) for span in spans] == [False, True, False, True]


@pytest.mark.parametrize("format, end", [("mamba", "<|endoftext|>"), ("pure", "</s>")])
def test_the_format_of_the_config_marks_the_turns(format, end):
    tokenizer = Tokenizer.train([], 258, format)
    config = dataclasses.replace(TINY, prompt_format=format)
    tokens, is_target, _ = make_sample(Record("r", None, TURNS), tokenizer, config, 500)
    texts = [
        tokenizer.backend.decode(tokens[is_target == learnt].tolist(), skip_special_tokens=False)
        for learnt in (False, True)
    ]
    between = "\n" if format == "mamba" else ""
    assert texts == [f"In: Which digit is this?\nOut: {between}In: Sure?\nOut: ", f"7{end}Yes, 7{end}"]


@pytest.mark.parametrize("format, end", [("zephyr", "<|endoftext|>"), ("pure", "</s>")])
def test_of_a_caption_every_token_is_a_target_and_the_question_is_left_out(format, end):
    tokenizer = Tokenizer.train([], 258, format)
    config = dataclasses.replace(TINY, prompt_format=format)
    record = Record("r", png(), (Turn("human", "Describe it.\n<image>"), Turn("gpt", " a red  box\n")))
    tokens, is_target, pixels = make_sample(record, tokenizer, config, 500, "caption")
    assert tokens.tolist() == tokenizer.encode(f"a red  box{end}")
    assert tokens[-1] == tokenizer.end_id(format) and is_target.all() and is_target.shape == tokens.shape
    assert pixels["siglip"][3, 3].tolist() == [255, 0, 0]
    cut = make_sample(record, tokenizer, config, 4, "caption")
    assert cut.tokens.tolist() == tokens[:4].tolist() and cut.is_target.tolist() == [True] * 4


def test_a_conversation_is_no_caption():
    with pytest.raises(InputError, match=r"r9: got 4 turns, expected a human turn and a caption; .* --data\.form chat"):
        make_sample(Record("r9", png(), TURNS), TOKENIZER, TINY, 100, "caption")


def test_long_conversations_are_cut_and_an_answer_must_be_left():
    tokens, is_target = tokenize(TURNS, TOKENIZER, 500, "r")
    first = int(np.argmax(is_target))
    cut, cut_target = tokenize(TURNS, TOKENIZER, first + 1, "r")
    np.testing.assert_array_equal(cut, tokens[: first + 1])
    assert cut_target.sum() == 1
    with pytest.raises(
        InputError, match=f"r: got no target among the first {first} of {len(tokens)} tokens.* raise --data.max-tokens"
    ):
        tokenize(TURNS, TOKENIZER, first, "r")


def test_a_batch_is_padded_and_rows_without_an_image_are_masked():
    long = make_sample(Record("a", png(), TURNS), TOKENIZER, TINY, 100)
    short = make_sample(Record("b", None, TURNS[:2]), TOKENIZER, TINY, 100)
    batch = collate([long, short], TINY, pad_id=0, length=100)
    for row, sample in enumerate((long, short)):
        n = len(sample.tokens)
        np.testing.assert_array_equal(batch.tokens[row, :n], sample.tokens)
        np.testing.assert_array_equal(batch.is_target[row, :n], sample.is_target)
        assert not batch.tokens[row, n:].any()
        assert not batch.is_target[row, n:].any()
        assert batch.lengths[row] == n
    assert batch.image_mask.tolist() == [True, False]
    assert batch.images["siglip"][:, 3, 3].tolist() == [[255, 0, 0], [0, 0, 0]]
    assert collate([long, long], TINY, 0, 100).image_mask is None


def test_a_bad_image_names_its_record():
    with pytest.raises(InputError, match="record-9: cannot decode"):
        make_sample(Record("record-9", png()[:-40], TURNS), TOKENIZER, TINY, 100)
