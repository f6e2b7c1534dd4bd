"""Generation against repeated full forward passes; batches against single rows; streams and chats against one shot."""

import functools
import logging
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from ml_mamba_jax import answer, batching, decoding, generation
from ml_mamba_jax.answer import Answer
from ml_mamba_jax.batching import stack_images
from ml_mamba_jax.config import MLMambaConfig
from ml_mamba_jax.conversation import Chat
from ml_mamba_jax.decoding import bucket, generate_tokens, pad_rows
from ml_mamba_jax.errors import InputError, NonFiniteError
from ml_mamba_jax.generation import answer_probabilities, generate, image_state, stream
from ml_mamba_jax.model import MLMamba
from ml_mamba_jax.prompt import Turn
from ml_mamba_jax.sampling import Sampling
from ml_mamba_jax.state import init_state, join, take_rows
from ml_mamba_jax.text_stream import TextStream, text_of
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
        *pad_rows(rows, TOKENIZER.eos_id),
        *batching.stack_images(images, MODEL.config),
        jax.random.key(seed),
        max_new_tokens=N_NEW,
        sampling=sampling,
        stop_ids=stop_ids,
        vocab_size=TOKENIZER.vocab_size,
    )
    return rows, np.asarray(tokens), np.asarray(counts), state


def by_forward_passes(ids: list[int], image, n: int = N_NEW, penalty: float = 1.0) -> list[int]:
    """The likeliest token after everything so far, by a full forward pass for each; stops at the end of text."""
    pixels, _ = batching.stack_images([image], MODEL.config)
    new = []
    while len(new) < n:
        padded = np.zeros((1, 112), np.int32)  # later tokens do not matter to a causal model
        padded[0, : len(ids) + len(new)] = ids + new
        logits = apply(weights(), jnp.asarray(padded), images=pixels)
        last = (0 if image is None else N_VISUAL) + len(ids) + len(new) - 1
        row = np.array(logits[0, last, : TOKENIZER.vocab_size])
        said = sorted({*ids, *new})
        row[said] = np.where(row[said] > 0, row[said] / penalty, row[said] * penalty)
        token = int(np.argmax(row))
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


def test_a_repetition_penalty_counts_prompt_and_answer():
    sampling = Sampling(repetition_penalty=1.3)
    rows, tokens, counts, _ = written(sampling=sampling)
    free = written()[1]
    assert (tokens != free).any(axis=1).all()  # without it the answers are others
    for row, image, got, count in zip(rows, IMAGES, tokens, counts, strict=True):
        assert got[:count].tolist() == by_forward_passes(row, image, penalty=1.3)
    options = {"max_new_tokens": N_NEW, "sampling": sampling}
    assert "".join(stream(MODEL, weights(), TOKENIZER, "hi", IMAGES[0], **options)) == text_of(
        tokens[0, : counts[0]].tolist(), TOKENIZER
    )

    # In a conversation it counts all turns.
    chat = Chat(MODEL, weights(), TOKENIZER)
    chat.ask("hi", IMAGES[0], max_new_tokens=3)
    before = list(chat.ids)
    chat.ask("what is this?", **options)
    read = chat.ids[: len(chat.ids) - len(chat.answer_ids)]
    assert read[: len(before)] == before == [*rows[0], *free[0, :3]]
    assert chat.answer_ids == by_forward_passes(read, IMAGES[0], penalty=1.3)


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
    padded, lengths = pad_rows(read, 0)
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
    padded, lengths = pad_rows(rows, 0)
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
    compiled = [function._cache_size() for function in (decoding._read_piece, decoding._write_in_place)]
    written(["hi there", "what?", "no"])
    assert [function._cache_size() for function in (decoding._read_piece, decoding._write_in_place)] == compiled


@contextmanager
def compiled():
    """Names of the programs that are compiled inside the block."""
    names, logger = [], logging.getLogger("jax._src.dispatch")

    class Handler(logging.Handler):
        def emit(self, record):
            if (message := record.getMessage()).startswith("Finished XLA compilation of "):
                names.append(message.split()[4])

    handler, propagate = Handler(), logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        with jax.log_compiles():
            yield names
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate


def test_other_numbers_compile_nothing():
    def ask(question="hi", n=5, seed=0, **options):
        generate(MODEL, weights(), TOKENIZER, [question], max_new_tokens=n, sampling=Sampling(**options), seed=seed)

    kinds = [
        ({}, {"min_p": 0.3}),  # greedy
        ({"temperature": 0.7}, {"temperature": 0.8, "min_p": 0.1}),
        ({"temperature": 0.7, "top_k": 3}, {"temperature": 0.9, "top_k": 60, "top_p": 0.8}),
        ({"temperature": 1.0, "top_p": 0.5}, {"temperature": 2.0, "top_p": 0.9, "min_p": 0.1}),
        ({"repetition_penalty": 1.1}, {"repetition_penalty": 1.3}),
    ]
    for one, other in kinds:
        with compiled() as first:
            ask(**one)
        assert [name for name in first if "loop" in name] or one == {}  # each kind is a program
        with compiled() as names:
            ask("hi you", n=7, seed=3, **other)
        assert names == [], other


def test_later_turns_and_longer_prompts_compile_nothing(monkeypatch):
    monkeypatch.setattr(decoding, "PIECE", 64)
    for image in (None, IMAGES[0]):
        chat = Chat(MODEL, weights(), TOKENIZER)
        for turn in range(4):
            with compiled() as names:
                chat.ask("a cat" + "?" * turn, image, max_new_tokens=5)
            # Only the second turn has a state to copy.
            assert turn == 0 or [name for name in names if "_nothing_written" not in name] == [], (turn, names)
            assert turn < 2 or names == []
    prompt = "a b c d " * 20
    ids = len(batching.encode_turns(TOKENIZER, prompt))
    assert ids > 64
    generate(MODEL, weights(), TOKENIZER, [prompt], max_new_tokens=5)
    with compiled() as names:
        generate(MODEL, weights(), TOKENIZER, [prompt + " a b c d" * 16], max_new_tokens=5)
    assert [name for name in names if "read_piece" in name or "slice" in name] == []


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=5.0)], ids=["greedy", "hot"])
def test_a_stream_is_what_generate_returns(sampling):
    options = {"max_new_tokens": N_NEW, "sampling": sampling, "seed": 3}
    for question, image in zip(QUESTIONS[:2], IMAGES[:2], strict=True):
        pieces = list(stream(MODEL, weights(), TOKENIZER, question, image, **options))
        assert len(pieces) > 1 and all(pieces)
        assert "".join(pieces) == generate(MODEL, weights(), TOKENIZER, [question], [image], **options)[0]


def test_a_stream_looks_at_the_device_once_for_several_tokens(monkeypatch):
    limits, write = [], answer.write
    monkeypatch.setattr(answer, "write", lambda *a, **o: limits.append(o["limit"]) or write(*a, **o))
    list(stream(MODEL, weights(), TOKENIZER, "hi", max_new_tokens=20, stop_ids=()))
    assert limits == [1, 8, 8, 3]


def test_long_prompts_are_read_in_pieces(monkeypatch):
    """Rows end in the first, the second and the last piece; memory is that of one piece whatever the length."""
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, TOKENIZER.vocab_size, n).tolist() for n in (5, 64, 100)]
    pixels, mask = batching.stack_images(IMAGES, MODEL.config)
    padded, lengths = pad_rows(rows, 0)
    logits, state = apply(weights(), padded, images=pixels, image_mask=mask, lengths=lengths, method="prefill")
    monkeypatch.setattr(decoding, "PIECE", 32)
    assert pad_rows(rows, 0)[0].shape == (3, 128)
    shapes = []
    read_piece = decoding._read_piece
    monkeypatch.setattr(decoding, "_read_piece", lambda *args: shapes.append(args[2].shape) or read_piece(*args))
    got = decoding.read(MODEL, weights(), *pad_rows(rows, 0), pixels, mask)
    assert shapes == [(3, 32)] * 4
    for a, b in ((got.logits, logits), (got.state.ssm, state.ssm), (got.state.conv, state.conv)):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())


def test_lengths_fall_into_few_buckets():
    piece = decoding.PIECE
    assert [bucket(n) for n in (1, 32, 33, 65, piece - 1, piece)] == [32, 32, 64, 128, piece, piece]
    assert [bucket(n) for n in (piece + 1, 2 * piece, 5 * piece + 40)] == [piece + 32, 2 * piece, 5 * piece + 64]


def test_one_image_is_encoded_once_for_many_questions():
    asked = generate(MODEL, weights(), TOKENIZER, QUESTIONS, [IMAGES[0]] * 3, max_new_tokens=N_NEW)
    state = image_state(MODEL, weights(), IMAGES[0])
    options = {"state": state, "max_new_tokens": N_NEW}
    assert generate(MODEL, weights(), TOKENIZER, QUESTIONS, **options) == asked
    assert "".join(stream(MODEL, weights(), TOKENIZER, QUESTIONS[1], **options)) == asked[1]
    both = join([state, image_state(MODEL, weights(), IMAGES[2])])
    rows = take_rows(both, jnp.asarray([1, 0, 1]))
    expected = generate(MODEL, weights(), TOKENIZER, QUESTIONS, [IMAGES[i] for i in (2, 0, 2)], max_new_tokens=N_NEW)
    assert generate(MODEL, weights(), TOKENIZER, QUESTIONS, state=rows, max_new_tokens=N_NEW) == expected
    with pytest.raises(InputError, match="image: got None"):
        image_state(MODEL, weights(), None)


def test_images_are_captioned_without_being_asked():
    """The first token of a caption follows the last visual token, as in training."""
    images, tokenizer, params = [IMAGES[0], IMAGES[2]], Tokenizer.train([], 257), printable_params()
    nothing = jnp.zeros((2, 32), jnp.int32), jnp.zeros(2, jnp.int32)
    pixels = stack_images(images, MODEL.config)
    tokens, counts, _ = generate_tokens(MODEL, params, *nothing, *pixels, jax.random.key(0), max_new_tokens=5)
    expected = [text_of(row[:n].tolist(), tokenizer) for row, n in zip(tokens, counts, strict=True)]
    caption = functools.partial(generate, MODEL, params, tokenizer, None, max_new_tokens=5)
    assert caption(images) == expected and caption(images[1]) == expected[1:]
    assert expected[0] != expected[1]
    with pytest.raises(InputError, match="expected at least one token or an image in each"):
        caption([None])
    with pytest.raises(InputError, match="images: got NoneType, expected a list"):
        caption()


def test_a_conversation_may_see_several_images():
    chat = Chat(MODEL, weights(), TOKENIZER)
    chat.ask("hi", IMAGES[0], max_new_tokens=4)
    first = list(chat.ids)
    chat.ask("what is this?", IMAGES[2], max_new_tokens=4)
    end = TOKENIZER.eos_id
    assert chat.ids[: len(first) + 1] == [*first, end]
    question = chat.ids[len(first) + 1 : len(chat.ids) - len(chat.answer_ids)]
    assert question == TOKENIZER.encode("\n<|user|>\nwhat is this?<|endoftext|>\n<|assistant|>\n")
    state = None
    for ids, image in ((first, IMAGES[0]), ([end], None), ([*question, *chat.answer_ids], IMAGES[2])):
        tokens, lengths = pad_rows([ids], end)
        pixels, _ = batching.stack_images([image], MODEL.config)
        _, state = apply(weights(), tokens, images=pixels, lengths=lengths, state=state, method="prefill")
    np.testing.assert_allclose(chat.state.ssm, state.ssm, atol=1e-4 * np.abs(state.ssm).max())


def test_a_forked_chat_goes_its_own_way():
    chat = Chat(MODEL, weights(), TOKENIZER)
    chat.ask("hi", IMAGES[0], max_new_tokens=4)
    other = chat.fork()
    first, second = (c.ask(q, max_new_tokens=6) for c, q in ((chat, "a cat?"), (other, "what is this?")))
    assert first != second and chat.turns[:2] == other.turns[:2] and chat.turns != other.turns
    again = Chat(MODEL, weights(), TOKENIZER)
    again.ask("hi", IMAGES[0], max_new_tokens=4)
    assert again.ask("what is this?", max_new_tokens=6) == second and again.ids == other.ids


def test_probabilities_are_those_of_the_first_tokens_among_each_other():
    answers = ["yes", "cat", "what is"]
    got = answer_probabilities(MODEL, weights(), TOKENIZER, QUESTIONS, IMAGES, answers=answers)
    first = [TOKENIZER.encode(answer)[0] for answer in answers]
    for row, question, image in zip(got, QUESTIONS, IMAGES, strict=True):
        ids = batching.encode_turns(TOKENIZER, question)
        pixels, _ = batching.stack_images([image], MODEL.config)
        logits = np.asarray(apply(weights(), jnp.asarray([ids], jnp.int32), images=pixels), np.float64)[0, -1, first]
        np.testing.assert_allclose(row, np.exp(logits) / np.exp(logits).sum(), rtol=1e-4)
    for answers in (["yes"], ["yes", ""], "yes"):
        with pytest.raises(InputError, match=r"answers: got .*, expected a list of at least two texts"):
            answer_probabilities(MODEL, weights(), TOKENIZER, ["a"], answers=answers)
    with pytest.raises(InputError, match="got 'yes' and 'yes', which begin with the same token"):
        answer_probabilities(MODEL, weights(), TOKENIZER, ["a"], answers=["no", "yes", "yes"])


def test_a_stop_string_ends_an_answer_and_is_no_part_of_it():
    tokenizer, options = Tokenizer.train([], 257), {"max_new_tokens": N_NEW}  # one byte a token
    ask = functools.partial(generate, MODEL, printable_params(), tokenizer)
    whole = ask(["what is this?"], **options)[0]
    stop = whole[3:6]
    cut = whole[: whole.index(stop)]
    assert 0 < len(cut) <= 3
    assert ask(["what is this?"], **options, stop_strings=[stop, "never"]) == [cut]
    assert ask(["what is this?"], **options, stop_strings=["never", whole + "!"]) == [whole]
    for stops, text in (([stop], cut), (["never", whole + "!"], whole)):
        pieces = stream(MODEL, printable_params(), tokenizer, "what is this?", **options, stop_strings=stops)
        assert "".join(pieces) == text
    chat = Chat(MODEL, printable_params(), tokenizer)
    assert chat.ask("what is this?", **options, stop_strings=[stop]) == cut == chat.turns[-1].text
    read = [*batching.encode_turns(tokenizer, "what is this?"), *chat.answer_ids]
    tokens, lengths = pad_rows([read], 0)
    _, state = apply(printable_params(), tokens, lengths=lengths, method="prefill")
    np.testing.assert_allclose(chat.state.ssm, state.ssm, atol=1e-4 * np.abs(state.ssm).max())
    for stops in ([""], "stop"):
        with pytest.raises(InputError, match=r"stop_strings: got .*, expected a list of texts of at least one"):
            ask(["a"], stop_strings=stops)


def test_generate_stops_within_a_block_of_tokens_when_all_rows_have_stopped(monkeypatch):
    tokenizer, prompts = Tokenizer.train([], 257), ["what is this?", "a cat?"]
    options = {"stop_ids": (), "max_new_tokens": 2000, "sampling": Sampling(temperature=1.0, top_k=9)}
    ask = functools.partial(generate, MODEL, printable_params(), tokenizer, prompts, **options)
    limits, write = [], generation.write_in_place
    monkeypatch.setattr(generation, "write_in_place", lambda *a, **o: limits.append(a[4]) or write(*a, **o))
    whole = ask()
    assert limits == [2000] and [len(text) for text in whole] == [2000, 2000]
    first, second = whole[0][5:12], whole[1][40:47]  # in the first and in the second block of 32
    assert [whole[0].index(first), whole[1].index(second)] == [5, 40]
    assert first not in whole[1][:64] and second not in whole[0][:64]
    limits.clear()
    assert ask(stop_strings=[first, second]) == [whole[0][:5], whole[1][:40]]
    assert limits == [32, 32]
    limits.clear()
    assert ask(stop_strings=["never " * 9], max_new_tokens=70) == [text[:70] for text in whole]
    assert limits == [32, 32, 6]


@given(st.text("ab \n", max_size=12), st.lists(st.text("ab ", min_size=1, max_size=3), max_size=3))
def test_a_stream_stops_where_the_first_stop_string_is_complete(text, stops):
    by_byte = Tokenizer.train([], 257)
    ends = [text.index(stop) + len(stop) for stop in stops if stop in text]
    seen = text[: min(ends)] if ends else text  # as far as it is read
    expected = seen[: min(seen.index(stop) for stop in stops if stop in seen)] if ends else text
    assert text_of(by_byte.encode(text), by_byte, stops) == expected.strip()


def test_an_abandoned_answer_has_the_state_of_what_was_handed_out():
    for taken in (1, 2, 5):
        answer = Answer(
            *(MODEL, weights(), TOKENIZER, batching.encode_turns(TOKENIZER, "hi")),
            max_new_tokens=N_NEW,
            sampling=Sampling(),
            seed=0,
            stop_ids=(),
        )
        pieces = iter(answer)
        while len(answer.ids) < taken:
            next(pieces)
        pieces.close()
        tokens, lengths = pad_rows([[*batching.encode_turns(TOKENIZER, "hi"), *answer.ids]], 0)
        _, state = apply(weights(), tokens, lengths=lengths, method="prefill")
        np.testing.assert_allclose(answer.state.ssm, state.ssm, atol=1e-4 * np.abs(state.ssm).max())


def test_a_long_answer_needs_no_more_memory_than_a_short_one():
    """Device buffers, compilations and the state stay as they are, however many tokens are written."""
    got = decoding.read(MODEL, weights(), *pad_rows([[1, 2, 3]], 0))
    options = {"capacity": 32, "sampling": Sampling(temperature=1.0), "stop_ids": (), "vocab_size": 280}

    def go_on(got):
        *_, got = decoding.write_in_place(MODEL, weights(), got, jax.random.key(0), 32, **options)
        return got

    got = go_on(got)
    live, compiled = len(jax.live_arrays()), decoding._write_in_place._cache_size()
    for _ in range(30):
        got = go_on(got)
    assert got.position == 32 * 31
    assert len(jax.live_arrays()) == live and decoding._write_in_place._cache_size() == compiled


def test_rows_without_anything_to_read_are_refused():
    for rows, images in (
        ([[], [1]], (None, None)),
        ([[1], []], batching.stack_images([IMAGES[0], None], MODEL.config)),
    ):
        with pytest.raises(
            InputError, match=r"tokens: got rows of \[.*\] tokens, expected at least one token or an image"
        ):
            decoding.read(MODEL, weights(), *pad_rows(rows, 0), *images)
    with pytest.raises(InputError, match="rows: got none, expected the token ids of at least one prompt"):
        pad_rows([], 0)
    # After an image alone there is something to say.
    pixels = batching.stack_images([IMAGES[0]], MODEL.config)[0]
    got = decoding.read(MODEL, weights(), *pad_rows([[]], 0), pixels)
    logits, _ = apply(weights(), jnp.zeros((1, 0), jnp.int32), images=pixels, method="prefill")
    np.testing.assert_allclose(got.logits, logits, atol=1e-5 * np.abs(logits).max())


def test_a_state_is_left_alone_unless_its_memory_is_given_up():
    state = image_state(MODEL, weights(), IMAGES[0])
    kept, rows = np.array(state.ssm), pad_rows([[1, 2, 3]], 0)
    first = decoding.read(MODEL, weights(), *rows, state=state)
    np.testing.assert_array_equal(state.ssm, kept)
    second = decoding.read(MODEL, weights(), *rows, state=state, donate=True)
    np.testing.assert_array_equal(first.logits, second.logits)
    assert state.ssm.is_deleted()


TEXT = "naïve  日本語\n🙂 is 👩‍👩‍👧 é"


def test_characters_of_several_bytes_are_emitted_whole_and_at_once():
    by_byte = Tokenizer.train([], 257)
    assert len(by_byte.encode(TEXT)) == len(TEXT.encode())
    characters = TextStream(by_byte)
    pieces = [characters.push(i) for i in by_byte.encode(f" {TEXT}\n")]
    assert "".join(pieces) == TEXT and characters.flush() == ""
    assert len([piece for piece in pieces if piece]) == len("".join(TEXT.split()))
    assert not any("\ufffd" in piece for piece in pieces)


@given(st.lists(st.integers(0, TOKENIZER.vocab_size - 1), max_size=12))
def test_pieces_join_to_the_decoded_text_for_any_tokens(ids):
    characters = TextStream(TOKENIZER)
    pieces = [characters.push(i) for i in ids]
    assert "".join([*pieces, characters.flush()]) == TOKENIZER.decode(ids).strip()


def test_bytes_that_never_become_a_character_do_not_pile_up(monkeypatch):
    by_byte = Tokenizer.train([], 257)
    stray = next(
        i for i in range(257) if by_byte.decode([i]) == "\ufffd" and by_byte.decode([i, i, i, i]) == "\ufffd" * 4
    )
    lengths, decode = [], by_byte.decode
    monkeypatch.setattr(by_byte, "decode", lambda ids: lengths.append(len(ids)) or decode(ids))
    characters = TextStream(by_byte)
    pieces = [characters.push(stray) for _ in range(500)]
    assert max(lengths) <= 13
    pieces += [characters.push(by_byte.encode("a")[0])]
    assert "".join(pieces) == "\ufffd" * 500 + "a"


@given(st.lists(st.sampled_from([*"a é🙂日".encode(), 0x80, 0xF0, 0xE3, 0x20, 0x0A]), max_size=40))
@example([195, 240, 169, 169, 195])  # one U+FFFD for three bytes
@example([240, 169, 169] * 9)
def test_pieces_of_any_bytes_join_to_what_utf_8_reads(data):
    by_byte = Tokenizer.train([], 257)
    byte_of = {by_byte.backend.token_to_id(c): b for b, c in byte_alphabet().items()}
    id_of = {b: i for i, b in byte_of.items()}
    characters = TextStream(by_byte)
    pieces = [characters.push(id_of[b]) for b in data]
    assert "".join([*pieces, characters.flush()]) == bytes(data).decode(errors="replace").strip()


def byte_alphabet() -> dict[int, str]:
    """The visible character by which a byte-level tokenizer names each byte."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in visible]
    return {b: chr(b) for b in visible} | {b: chr(256 + n) for n, b in enumerate(others)}


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
    tokens, lengths = pad_rows([tokenizer.encode("In: what is this?\nOut: ")], tokenizer.eos_id)
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
    tokens, lengths = pad_rows([read], tokenizer.eos_id)
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
    tokens, lengths = pad_rows([[1, 2], [3] * 33], 9)
    assert tokens.shape == (2, 64) and lengths.tolist() == [2, 33]
    assert tokens[0].tolist() == [1, 2] + [9] * 62
    assert pad_rows([[1] * 32], 0)[0].shape == (1, 32)


def test_input_that_cannot_be_answered_is_refused():
    def ask(prompts, images=None, model=MODEL, tokenizer=TOKENIZER, **options):
        generate(model, weights(), tokenizer, prompts, images, **options)

    with pytest.raises(InputError, match=r"prompts: got one string, expected a list of questions; pass \[question\]"):
        ask("what is this?")
    with pytest.raises(InputError, match="got 2 prompts and 1 images"):
        ask(["a", "b"], [None])
    with pytest.raises(InputError, match="got 0 prompts"):
        ask([])
    with pytest.raises(InputError, match="max_new_tokens: got 0, expected a whole number of at least 1"):
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
    with pytest.raises(
        InputError, match=r"state: got conv float32\[2, 3, .*\], expected float32\[2, 2, .*\] for 2 rows"
    ):
        ask(["a", "b"], state=init_state(MODEL.config.language, 3))
    with pytest.raises(InputError, match=r"state: got conv bfloat16.*, expected float32"):
        ask(["a", "b"], state=init_state(MODEL.config.language, 1, "bfloat16"))
    small = MODEL.config.language.__class__(MODEL.config.language.mixer, n_layers=1, vocab_size=270)
    with pytest.raises(
        InputError, match=f"tokenizer: got {TOKENIZER.vocab_size} entries, expected at most the 270 of the model"
    ):
        ask(["a"], model=MLMamba(MLMambaConfig(language=small)))


def with_language(**changes) -> dict:
    return {**weights(), "language": {**weights()["language"], **changes}}


def with_mixer(**changes) -> dict:
    blocks = weights()["language"]["blocks"]
    return with_language(blocks={**blocks, "mixer": {**blocks["mixer"], **changes}})


def nan_in_the_last_layer(name: str) -> dict:
    leaf = weights()["language"]["blocks"]["mixer"][name]
    return with_mixer(**{name: jax.tree.map(lambda a: a.at[-1].set(jnp.nan), leaf)})


NAN = {
    "embedding": lambda: with_language(
        embedding=weights()["language"]["embedding"].at[TOKENIZER.encode("h")[0]].set(jnp.nan)
    ),
    "norm": lambda: with_language(norm=jax.tree.map(lambda a: a * jnp.nan, weights()["language"]["norm"])),
    **{
        name: functools.partial(nan_in_the_last_layer, name)
        for name in ("in_proj", "out_proj", "D", "norm_weight", "A_log")
    },
}


@pytest.mark.parametrize("where", NAN)
def test_nan_anywhere_in_the_model_is_an_error_and_not_an_answer(where):
    """Some of it never reaches the state: it arises after the last scan."""
    broken = NAN[where]()
    calls = {
        "generate": lambda: generate(MODEL, broken, TOKENIZER, ["hi"] * 3, IMAGES, max_new_tokens=N_NEW),
        "stream": lambda: list(stream(MODEL, broken, TOKENIZER, "hi", max_new_tokens=N_NEW)),
        "Chat": lambda: Chat(MODEL, broken, TOKENIZER).ask("hi", max_new_tokens=N_NEW),
        "answer_probabilities": lambda: answer_probabilities(MODEL, broken, TOKENIZER, ["hi"], answers=["a", "b"]),
        "generate_tokens": lambda: written(["hi"] * 3, params=broken),
    }
    for name, call in calls.items():
        with pytest.raises(NonFiniteError, match=f"^{name}: got NaN or infinity"):
            call()


def test_nan_among_the_pixels_features_is_an_error_where_an_image_is_seen():
    broken = {**weights(), "connector": jax.tree.map(lambda a: a * jnp.nan, weights()["connector"])}
    with pytest.raises(NonFiniteError, match=r"^image_state: got NaN"):
        image_state(MODEL, broken, IMAGES[0])
    assert generate(MODEL, broken, TOKENIZER, ["hi"], max_new_tokens=3)


def test_only_logits_from_which_a_token_is_chosen_need_be_finite():
    before = decoding.read(MODEL, weights(), *pad_rows([[1, 2], [3]], 0))
    options = {"capacity": 4, "sampling": Sampling(), "stop_ids": (), "vocab_size": TOKENIZER.vocab_size}
    for token, finished, expected in ((0, False, False), (0, True, True), (TOKENIZER.vocab_size, False, True)):
        got = before._replace(logits=before.logits.at[0, token].set(jnp.nan), finished=jnp.asarray([finished, False]))
        *_, after = decoding.write(MODEL, weights(), got, jax.random.key(0), 2, **options)
        assert after.finite.tolist() == [expected, True]
