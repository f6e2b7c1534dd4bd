"""Generation against repeated full forward passes; batches against single rows; streams and chats against one shot."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ml_mamba_jax import batching
from ml_mamba_jax.config import MLMambaConfig
from ml_mamba_jax.errors import InputError, NonFiniteError
from ml_mamba_jax.generation import Chat, WholeCharacters, generate, generate_tokens, stream
from ml_mamba_jax.model import MLMamba
from ml_mamba_jax.prompt import Turn
from ml_mamba_jax.sampling import Sampling
from ml_mamba_jax.tokenizer import Tokenizer
from tests import tiny_model
from tests.tiny_model import MODEL, N_VISUAL, apply

TOKENIZER = Tokenizer.train(["what is this? a cat, the cat sat"] * 3, 280)
N_NEW = 10
QUESTIONS = ["hi", "what is this?", "a cat?"]


@functools.cache
def weights() -> dict:
    """Parameters whose answers depend on all that was read: open gates and a slow decay. Others hear the last token only."""
    params = tiny_model.params()
    blocks = params["language"]["blocks"]
    mixer = {
        **blocks["mixer"],
        "in_proj": {"kernel": 3 * blocks["mixer"]["in_proj"]["kernel"]},
        "A_log": blocks["mixer"]["A_log"] - 4,
    }
    return {**params, "language": {**params["language"], "blocks": {**blocks, "mixer": mixer}}}


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (40, 28, 3), dtype=np.uint8)


IMAGES = [picture(0), None, picture(2)]


def written(prompts=QUESTIONS, images=IMAGES, params=None, stop_ids=(TOKENIZER.eos_id,), sampling=Sampling(), seed=0):  # noqa: B008
    rows = [batching.encode_turns(TOKENIZER, prompt) for prompt in prompts]
    tokens, counts, state = generate_tokens(
        MODEL,
        weights() if params is None else params,
        *batching.pad_rows(rows, TOKENIZER.eos_id),
        *batching.stack_images(images, MODEL.config),
        jax.random.key(seed),
        max_new_tokens=N_NEW,
        sampling=sampling,
        stop_ids=stop_ids,
        vocab_size=TOKENIZER.vocab_size,
    )
    return rows, np.asarray(tokens), np.asarray(counts), state


def by_forward_passes(ids: list[int], image, n: int = N_NEW) -> list[int]:
    """The likeliest token after everything so far, by a full forward pass for each; stops at the end of text."""
    pixels, _ = batching.stack_images([image], MODEL.config)
    new = []
    while len(new) < n:
        padded = np.zeros((1, 112), np.int32)  # later tokens do not matter to a causal model
        padded[0, : len(ids) + len(new)] = ids + new
        logits = apply(weights(), jnp.asarray(padded), images=pixels)
        last = (0 if image is None else N_VISUAL) + len(ids) + len(new) - 1
        token = int(np.argmax(logits[0, last, : TOKENIZER.vocab_size]))
        if token == TOKENIZER.eos_id:
            break
        new.append(token)
    return new


def test_greedy_is_the_argmax_of_full_forward_passes():
    rows, tokens, counts, _ = written()
    assert tokens.shape == (3, N_NEW) and tokens.dtype == np.int32
    for row, image, got, count in zip(rows, IMAGES, tokens, counts, strict=True):
        assert got[:count].tolist() == by_forward_passes(row, image)
    texts = generate(MODEL, weights(), TOKENIZER, QUESTIONS, IMAGES, max_new_tokens=N_NEW)
    assert texts == [TOKENIZER.decode(t[:n].tolist()).strip() for t, n in zip(tokens, counts, strict=True)]
    assert len(set(texts)) == 3  # different questions have different answers, or this test says little


def test_a_batch_equals_its_rows_one_by_one():
    together = generate(MODEL, weights(), TOKENIZER, QUESTIONS, IMAGES, max_new_tokens=N_NEW)
    alone = [
        generate(MODEL, weights(), TOKENIZER, [question], [image], max_new_tokens=N_NEW)[0]
        for question, image in zip(QUESTIONS, IMAGES, strict=True)
    ]
    assert together == alone


def test_the_image_matters_and_may_come_in_any_form(tmp_path):
    Image.fromarray(IMAGES[0]).save(tmp_path / "a.png")
    forms = [IMAGES[0], Image.fromarray(IMAGES[0]), tmp_path / "a.png", str(tmp_path / "a.png")]
    forms += [Image.fromarray(IMAGES[0]).convert("RGBA"), Image.open(tmp_path / "a.png")]
    answers = {generate(MODEL, weights(), TOKENIZER, ["hi"], [form], max_new_tokens=N_NEW)[0] for form in forms}
    assert len(answers) == 1
    assert answers != {generate(MODEL, weights(), TOKENIZER, ["hi"], [picture(5)], max_new_tokens=N_NEW)[0]}


def test_a_finished_row_stays_finished_and_the_others_go_on():
    rows, free, _, _ = written(stop_ids=())
    stop = int(free[0, 3])
    expected = [row.tolist().index(stop) if stop in row else N_NEW for row in free]
    assert expected[0] <= 3 and N_NEW in expected
    _, tokens, counts, state = written(stop_ids=(stop,))
    assert counts.tolist() == expected
    for row, count in enumerate(counts):
        np.testing.assert_array_equal(tokens[row, :count], free[row, :count])
        assert not tokens[row, count:].any()
    # The state is that after the last token that belongs to the answer.
    read = [row + new[:count].tolist() for row, new, count in zip(rows, tokens, counts, strict=True)]
    padded, lengths = batching.pad_rows(read, 0)
    pixels, mask = batching.stack_images(IMAGES, MODEL.config)
    _, expected_state = apply(weights(), padded, images=pixels, image_mask=mask, lengths=lengths, method="prefill")
    for a, b in zip(state, expected_state, strict=True):
        for row in range(3):
            np.testing.assert_allclose(a[:, row], b[:, row], atol=1e-4 * np.abs(b[:, row]).max())


def test_ids_that_no_token_has_are_never_chosen():
    embedding = weights()["language"]["embedding"]
    loud = {
        **weights(),
        "language": {**weights()["language"], "embedding": embedding.at[TOKENIZER.vocab_size :].multiply(99)},
    }
    rows, tokens, counts, _ = written(params=loud)
    padded, lengths = batching.pad_rows(rows, 0)
    logits, _ = apply(loud, padded, lengths=lengths, method="prefill")
    assert (np.argmax(logits, axis=-1) >= TOKENIZER.vocab_size).all()  # they would be, without the mask
    assert counts.sum() > 0 and tokens.max() < TOKENIZER.vocab_size
    _, tokens, *_ = written(params=loud, sampling=Sampling(temperature=5.0), stop_ids=())
    assert tokens.max() < TOKENIZER.vocab_size


def test_seeds_repeat_and_differ():
    hot = Sampling(temperature=5.0)
    first, again, other = (written(sampling=hot, stop_ids=(), seed=seed)[1] for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).mean() > 0.5
    assert len({tuple(row) for row in first}) == 3
    assert (first[:, 1:] != first[:, :-1]).mean() > 0.5  # each position draws anew


def test_another_prompt_length_compiles_nothing():
    written(["hi"] * 3)
    compiled = generate_tokens._cache_size()
    written(["hi there", "what?", "no"])
    assert generate_tokens._cache_size() == compiled


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=5.0)], ids=["greedy", "hot"])
def test_a_stream_is_what_generate_returns(sampling):
    options = {"max_new_tokens": N_NEW, "sampling": sampling, "seed": 3}
    for question, image in zip(QUESTIONS[:2], IMAGES[:2], strict=True):
        pieces = list(stream(MODEL, weights(), TOKENIZER, question, image, **options))
        assert len(pieces) > 1 and all(pieces)
        assert "".join(pieces) == generate(MODEL, weights(), TOKENIZER, [question], [image], **options)[0]


TEXT = "naïve  日本語\n🙂 is 👩‍👩‍👧 é"


def test_characters_of_several_bytes_are_emitted_whole_and_at_once():
    by_byte = Tokenizer.train([], 257)
    assert len(by_byte.encode(TEXT)) == len(TEXT.encode())
    characters = WholeCharacters(by_byte)
    pieces = [characters.push(i) for i in by_byte.encode(f" {TEXT}\n")]
    assert "".join(pieces) == TEXT and characters.flush() == ""
    assert len([piece for piece in pieces if piece]) == len("".join(TEXT.split()))
    assert not any("\ufffd" in piece for piece in pieces)


@given(st.lists(st.integers(0, TOKENIZER.vocab_size - 1), max_size=12))
def test_pieces_join_to_the_decoded_text_for_any_tokens(ids):
    characters = WholeCharacters(TOKENIZER)
    pieces = [characters.push(i) for i in ids]
    assert "".join([*pieces, characters.flush()]) == TOKENIZER.decode(ids).strip()


def printable_params(tokenizer: Tokenizer = Tokenizer.train([], 257)) -> dict:  # noqa: B008
    """Parameters that answer in visible ASCII only, so that it and its text say the same: other tokens are faint."""
    visible = np.zeros(512, bool)
    visible[[i for c in range(33, 127) for i in tokenizer.encode(chr(c))]] = True
    language = weights()["language"]
    return {
        **weights(),
        "language": {**language, "embedding": language["embedding"] * np.where(visible, 1, 0.1)[:, None]},
    }


def from_scratch(conversations: list, images: list) -> list[str]:
    """Six tokens of answer to each conversation, read whole. Always a batch of six rows, so that it compiles once."""
    missing = 6 - len(conversations)
    rows, images = [*conversations, *["x" * 150] * missing], [*images, *[None] * missing]
    answers = generate(MODEL, printable_params(), Tokenizer.train([], 257), rows, images, max_new_tokens=6)
    return answers[: len(conversations)]


def test_a_chat_equals_the_conversation_from_scratch():
    tokenizer = Tokenizer.train([], 257)
    chat, conversations, answers, sizes = Chat(MODEL, printable_params(), tokenizer), [], [], []
    for i, question in enumerate(["what is this?", "and then", "why so?"]):
        conversations.append([*chat.turns, Turn("human", question)])
        answers.append(chat.ask(question, IMAGES[0] if i == 0 else None, max_new_tokens=6))
        assert chat.turns == [*conversations[-1], Turn("gpt", answers[-1])]
        assert tokenizer.encode(answers[-1]) == chat.answer_ids and len(answers[-1]) == 6
        sizes.append(sum(a.nbytes for a in chat.state))
    assert len(set(sizes)) == 1  # memory does not grow

    # The end of text follows an answer that ends by itself just as it follows one that is cut by the limit.
    cut = Chat(MODEL, printable_params(), tokenizer)
    cut.ask("what is this?", IMAGES[0], max_new_tokens=6, stop_ids=tokenizer.encode(answers[0][4]))
    kept = answers[0].index(answers[0][4])
    assert cut.turns[-1] == Turn("gpt", answers[0][:kept]) and kept > 0
    conversations.append([*cut.turns, Turn("human", "go on")])
    answers.append(cut.ask("go on", max_new_tokens=6))

    assert answers == from_scratch(conversations, [IMAGES[0]] * 4)
    # What was said before matters, and so does the image: else the comparison would prove little.
    forgetful = from_scratch(["and then", "why so?", conversations[1], conversations[2]], [IMAGES[0]] * 2 + [None] * 2)
    assert answers[1:3] != forgetful[:2] and answers[1:3] != forgetful[2:], (answers, forgetful)


def test_a_chat_streams_survives_an_abandoned_answer_and_resets():
    chat = Chat(MODEL, printable_params(), Tokenizer.train([], 257))
    pieces = chat.stream("what is this?", IMAGES[0], max_new_tokens=6)
    begun = next(pieces) + next(pieces)
    pieces.close()
    assert chat.turns == [Turn("human", "what is this?"), Turn("gpt", begun)]
    with pytest.raises(InputError, match="image: got one in the middle of a conversation"):
        chat.ask("and this?", IMAGES[0])
    turns = [*chat.turns, Turn("human", "and then")]
    expected, alone = from_scratch([turns, "and then"], [IMAGES[0], None])
    assert "".join(chat.stream("and then", max_new_tokens=6)) == expected
    chat.reset()
    assert chat.turns == [] and chat.state is None
    assert chat.ask("and then", max_new_tokens=6) == alone != expected


@pytest.mark.parametrize("format", ["mamba", "pure"])
def test_another_prompt_format_has_its_own_marks_and_stops_at_its_own_end(format):
    model = MLMamba(MODEL.config.replace(prompt_format=format))
    tokenizer = Tokenizer.train([], 258, "pure")
    params, end_id, options = printable_params(tokenizer), tokenizer.end_id(format), {"max_new_tokens": N_NEW}
    tokens, lengths = batching.pad_rows([tokenizer.encode("In: what is this?\nOut: ")], tokenizer.eos_id)
    free, *_ = generate_tokens(
        *(model, params, tokens, lengths, None, None, jax.random.key(0)), stop_ids=(), vocab_size=258, **options
    )
    free = free[0].tolist()
    # Let the end of a turn win wherever the fourth token would have been chosen.
    embedding = params["language"]["embedding"]
    embedding = embedding.at[end_id].set(1.001 * embedding[free[3]])
    params = {**params, "language": {**params["language"], "embedding": embedding}}
    expected = tokenizer.decode(free[: free.index(free[3])])
    assert expected and generate(model, params, tokenizer, ["what is this?"], **options) == [expected]
    assert "".join(stream(model, params, tokenizer, "what is this?", **options)) == expected

    chat = Chat(model, params, tokenizer)
    assert chat.ask("what is this?", **options) == expected
    turns = [Turn("human", "what is this?"), Turn("gpt", expected), Turn("human", "and then")]
    assert chat.ask("and then", **options) == generate(model, params, tokenizer, [turns], **options)[0] != ""
    read = tokenizer.encode("In: what is this?\nOut: ") + tokenizer.encode(expected) + [end_id]
    read += tokenizer.encode("\nIn: and then\nOut: " if format == "mamba" else "In: and then\nOut: ") + chat.answer_ids
    tokens, lengths = batching.pad_rows([read], tokenizer.eos_id)
    _, state = apply(params, tokens, lengths=lengths, method="prefill")
    np.testing.assert_allclose(chat.state.ssm, state.ssm, atol=1e-4 * np.abs(state.ssm).max())


def test_a_tokenizer_without_the_end_of_the_prompt_format_is_refused():
    model = MLMamba(MODEL.config.replace(prompt_format="pure"))
    for ask in (lambda: generate(model, weights(), TOKENIZER, ["a"]), lambda: Chat(model, weights(), TOKENIZER)):
        with pytest.raises(InputError, match="got a vocabulary without </s>"):
            ask()


def test_every_turn_is_tokenised_on_its_own_and_padded_to_a_bucket():
    turns = [Turn("human", "a cat"), Turn("gpt", "the cat"), Turn("human", "sat")]
    pieces = ["<|user|>\na cat<|endoftext|>\n<|assistant|>\n", "the cat<|endoftext|>"]
    pieces.append("\n<|user|>\nsat<|endoftext|>\n<|assistant|>\n")
    assert batching.encode_turns(TOKENIZER, turns) == [i for piece in pieces for i in TOKENIZER.encode(piece)]
    assert batching.encode_turns(TOKENIZER, "a cat") == TOKENIZER.encode(pieces[0])
    tokens, lengths = batching.pad_rows([[1, 2], [3] * 33], 9)
    assert tokens.shape == (2, 64) and lengths.tolist() == [2, 33]
    assert tokens[0].tolist() == [1, 2] + [9] * 62
    assert batching.pad_rows([[1] * 32], 0)[0].shape == (1, 32)


def test_input_that_cannot_be_answered_is_refused():
    def ask(prompts, images=None, model=MODEL, tokenizer=TOKENIZER, **options):
        generate(model, weights(), tokenizer, prompts, images, **options)

    with pytest.raises(InputError, match=r"prompts: got one string, expected a list of questions; pass \[question\]"):
        ask("what is this?")
    with pytest.raises(InputError, match="got 2 prompts and 1 images"):
        ask(["a", "b"], [None])
    with pytest.raises(InputError, match="got 0 prompts"):
        ask([])
    with pytest.raises(InputError, match="max_new_tokens: got 0, expected at least 1"):
        ask(["a"], max_new_tokens=0)
    with pytest.raises(InputError, match=r"nowhere\.png: found no such image file"):
        ask(["a"], ["nowhere.png"])
    with pytest.raises(InputError, match=r"image: got float64 \(4, 4, 3\), expected uint8 pixels"):
        ask(["a"], [np.zeros((4, 4, 3))])
    with pytest.raises(InputError, match=r"image: got int, expected a file name, PIL\.Image or uint8 pixels"):
        ask(["a"], [7])
    with pytest.raises(InputError, match="image: got one, but this model has no image encoders"):
        ask(["a"], [IMAGES[0]], model=MLMamba(MLMambaConfig(language=MODEL.config.language)))
    with pytest.raises(ValueError, match="got a gpt turn last"):
        ask([[Turn("human", "a"), Turn("gpt", "b")]])
    small = MODEL.config.language.__class__(MODEL.config.language.mixer, n_layers=1, vocab_size=270)
    with pytest.raises(
        InputError, match=f"tokenizer: got {TOKENIZER.vocab_size} entries, expected at most the 270 of the model"
    ):
        ask(["a"], model=MLMamba(MLMambaConfig(language=small)))


def test_nan_inside_the_model_is_an_error_and_not_an_answer():
    embedding = weights()["language"]["embedding"].at[TOKENIZER.encode("h")[0]].set(jnp.nan)
    broken = {**weights(), "language": {**weights()["language"], "embedding": embedding}}
    with pytest.raises(NonFiniteError, match="got NaN or infinity inside the model"):
        generate(MODEL, broken, TOKENIZER, QUESTIONS, IMAGES, max_new_tokens=N_NEW)
    with pytest.raises(NonFiniteError):
        list(stream(MODEL, broken, TOKENIZER, "hi", max_new_tokens=N_NEW))
