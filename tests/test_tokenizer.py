"""The tokenizer: round trips, what it refuses."""

import pytest

from ml_mamba_jax.errors import InputError
from ml_mamba_jax.tokenizer import Tokenizer

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
    with pytest.raises(InputError, match=r"found no .*nowhere/tokenizer\.json"):
        Tokenizer.from_pretrained("./nowhere/tokenizer.json")
    damaged = tmp_path / "tokenizer.json"
    damaged.write_text('{"version": "1.0", "mod')
    with pytest.raises(InputError, match=r"cannot read .*tokenizer\.json"):
        Tokenizer.from_pretrained(damaged)
    import tokenizers

    with pytest.raises(InputError, match=r"without <\|endoftext\|>"):
        Tokenizer(tokenizers.Tokenizer(tokenizers.models.BPE()))
