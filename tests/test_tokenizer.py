"""The tokenizer: round trips, ends of turns, the ids of the real GPT-NeoX vocabulary, what it refuses."""

import pytest

from ml_mamba_jax.errors import InputError
from ml_mamba_jax.prompt import Piece, Turn, render, render_question
from ml_mamba_jax.tokenizer import Tokenizer
from tests import real_data

TEXTS = ["<|user|>\nWhich digit is this?<|endoftext|>\n<|assistant|>\n", "7<|endoftext|>"]


def test_any_text_survives_and_end_of_text_is_one_token():
    tokenizer = Tokenizer.train(TEXTS, 300)
    for text in (*TEXTS, "déjà vu 🐍 \n\t x"):
        assert tokenizer.decode(tokenizer.encode(text)) == text.replace("<|endoftext|>", "")
    assert tokenizer.eos_id == 0
    assert tokenizer.encode("7<|endoftext|>")[-1] == 0
    assert tokenizer.vocab_size <= 300


def test_training_merges_what_is_frequent():
    small, large = Tokenizer.train(TEXTS * 20, 257), Tokenizer.train(TEXTS * 20, 300)
    assert small.vocab_size == 257
    assert len(large.encode(TEXTS[0])) < len(small.encode(TEXTS[0]))


@pytest.mark.parametrize("format, end", [("zephyr", "<|endoftext|>"), ("mamba", "<|endoftext|>"), ("pure", "</s>")])
def test_the_end_of_a_turn_is_one_token_of_a_tokenizer_trained_for_the_format(format, end, tmp_path):
    texts = [piece.text for piece in render([Turn("human", "Which digit?"), Turn("gpt", "7")] * 2, format)]
    trained = Tokenizer.train(texts, 280, format)
    trained.save(tmp_path)
    for tokenizer in (trained, Tokenizer.from_pretrained(tmp_path)):
        end_id = tokenizer.end_id(format)
        assert tokenizer.encode(f"7{end}\n")[1:-1] == [end_id]
        assert tokenizer.backend.id_to_token(end_id) == end
        assert tokenizer.eos_id == 0 and tokenizer.end_id("zephyr") == 0, "padding stays what it is"
        assert tokenizer.decode(tokenizer.encode(f"7{end}")) == "7"


def test_a_vocabulary_without_the_end_of_a_turn_is_refused():
    tokenizer = Tokenizer.train(TEXTS, 300)
    with pytest.raises(InputError, match=r"got a vocabulary without </s>, expected .* prompt format 'pure'"):
        tokenizer.end_id("pure")
    with pytest.raises(InputError, match="unknown prompt format 'puer'; did you mean 'pure'"):
        tokenizer.end_id("puer")


def test_a_mark_in_the_vocabulary_that_no_text_becomes_is_no_end_of_a_turn():
    """Words split before merging: an entry </s> that is not a special token never comes out of a text."""
    import json

    import tokenizers

    vocabulary = json.loads(Tokenizer.train(TEXTS, 300).backend.to_str())
    vocabulary["model"]["vocab"]["</s>"] = 299
    tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(vocabulary)))
    assert tokenizer.backend.token_to_id("</s>") == 299
    with pytest.raises(InputError, match="without </s>"):
        tokenizer.end_id("pure")


def test_pieces_are_encoded_each_on_its_own():
    tokenizer = Tokenizer.train(["ab" * 9], 258)
    assert tokenizer.encode("ab") != tokenizer.encode("a") + tokenizer.encode("b")
    ids, is_target = tokenizer.encode_pieces([Piece("a", False), Piece("bab<|endoftext|>", True), Piece("", True)])
    assert ids == tokenizer.encode("a") + tokenizer.encode("bab<|endoftext|>")
    assert is_target == [False] + [True] * (len(ids) - 1)
    assert tokenizer.encode_pieces([]) == ([], [])


# < | user |> \n Is the bicycle parked on the right side of the dog ? <|endoftext|> \n < | ass istant |> \n
FIRST_QUESTION = [29, 93, 4537, 49651, 187, 2513, 253, 25812, 24805, 327, 253, 987, 1930, 273, 253, 4370, 32]
FIRST_QUESTION += [0, 187, 29, 93, 515, 5567, 49651, 187]
ANSWER = [4374, 15, 0]  # Yes . <|endoftext|>
SECOND_QUESTION = [187, 29, 93, 4537, 49651, 187, 5804, 309, 10831, 1060, 32, 0, 187, 29, 93, 515, 5567, 49651, 187]
TWO_TURNS = [
    Turn("human", "<image>\nIs the bicycle parked on the right side of the dog?"),
    Turn("gpt", "Yes."),
    Turn("human", "Can I swim here?"),
]


@real_data.needs_gpt_neox
def test_a_conversation_in_the_ids_of_gpt_neox():
    tokenizer = Tokenizer.from_pretrained(real_data.TOKENIZER_FILE)
    assert tokenizer.vocab_size == 50_277
    assert tokenizer.eos_id == tokenizer.end_id("zephyr") == tokenizer.end_id("mamba") == 0
    ids, is_target = tokenizer.encode_pieces(render_question(TWO_TURNS))
    assert ids == FIRST_QUESTION + ANSWER + SECOND_QUESTION
    assert [i for i, target in zip(ids, is_target, strict=True) if target] == ANSWER
    for mark in ("<|user|>", "<|assistant|>"):
        assert len(tokenizer.encode(mark)) > 1, "the marks of speakers are ordinary text"
        assert tokenizer.decode(tokenizer.encode(mark)) == mark
    with pytest.raises(InputError, match="without </s>"):
        tokenizer.end_id("pure")


@real_data.needs_gpt_neox
@pytest.mark.parametrize("format", ["zephyr", "mamba", "pure"])
def test_transformers_agrees_on_the_ids_of_gpt_neox(format):
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer.from_pretrained(real_data.TOKENIZER_FILE)
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(real_data.TOKENIZER_FILE))
    odd = [Turn("gpt", "déjà vu 🐍  \n\n  def f(x):\n\treturn 1_000"), Turn("human", ""), Turn("gpt", "")]
    for piece in render([*TWO_TURNS, *odd], format):
        assert tokenizer.encode(piece.text) == theirs(piece.text).input_ids, piece
        assert tokenizer.decode(tokenizer.encode(piece.text)) == theirs.decode(
            tokenizer.encode(piece.text), skip_special_tokens=True
        )


def test_a_saved_tokenizer_is_read_from_its_folder_and_its_file(tmp_path):
    tokenizer = Tokenizer.train(TEXTS, 300)
    path = tokenizer.save(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["tokenizer.json"]
    for source in (tmp_path, path, str(path)):
        assert Tokenizer.from_pretrained(source).encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])


def test_a_hub_id_is_asked_of_the_hub(monkeypatch):
    import tokenizers

    asked = []
    backend = Tokenizer.train(TEXTS, 300).backend
    monkeypatch.setattr(tokenizers.Tokenizer, "from_pretrained", lambda name: asked.append(name) or backend)
    assert Tokenizer.from_pretrained("EleutherAI/gpt-neox-20b").eos_id == 0
    assert asked == ["EleutherAI/gpt-neox-20b"]


def test_what_is_no_tokenizer_is_refused(tmp_path):
    with pytest.raises(InputError, match="257"):
        Tokenizer.train(TEXTS, 100)
    with pytest.raises(InputError, match=r"got 257, expected at least 258 .*</s>"):
        Tokenizer.train(TEXTS, 257, "pure")
    with pytest.raises(InputError, match=r"found no .*nowhere/tokenizer\.json"):
        Tokenizer.from_pretrained("./nowhere/tokenizer.json")
    damaged = tmp_path / "tokenizer.json"
    damaged.write_text('{"version": "1.0", "mod')
    with pytest.raises(InputError, match=r"cannot read .*tokenizer\.json"):
        Tokenizer.from_pretrained(damaged)
    import tokenizers

    with pytest.raises(InputError, match=r"without <\|endoftext\|>"):
        Tokenizer(tokenizers.Tokenizer(tokenizers.models.BPE()))
