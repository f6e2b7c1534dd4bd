"""The loss and its gradient, against plain NumPy and across ways to cut a batch."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from ml_mamba_jax.data.records import Record
from ml_mamba_jax.data.samples import Batch, collate, collate_packed, make_sample, n_positions
from ml_mamba_jax.errors import InputError
from ml_mamba_jax.model import MLMamba
from ml_mamba_jax.prompt import Turn
from ml_mamba_jax.tokenizer import Tokenizer
from ml_mamba_jax.training.losses import mean_loss_and_gradient, target_losses
from tests import tiny_model

MODEL, PARAMS = tiny_model.MODEL, tiny_model.params()


def png(colour: str) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (40, 20), colour).save(stream, format="PNG")
    return stream.getvalue()


def make_batch(rows: int = 8, length: int = 9) -> Batch:
    """Rows with very different numbers of targets."""
    is_target = np.zeros((rows, length), bool)
    for row in range(rows):
        is_target[row, length - 1 - row % (length - 1) :] = True
    return Batch(
        tokens=tiny_model.tokens(rows, length),
        is_target=jnp.asarray(is_target),
        lengths=jnp.full(rows, length, jnp.int32),
        images=tiny_model.pixels(rows),
        image_mask=None,
    )


def cross_entropies(logits, tokens, is_target) -> list[float]:
    """Of every target [b l], given the logits of all positions, those of the visual tokens before the text."""
    logits, n_visual = np.asarray(logits, np.float64), logits.shape[1] - tokens.shape[1]
    losses = []
    for row, position in zip(*np.nonzero(is_target), strict=True):
        before = logits[row, n_visual + position - 1]
        losses.append(np.log(np.exp(before).sum()) - before[tokens[row, position]])
    return losses


def test_the_loss_is_the_cross_entropy_of_the_targets():
    batch = make_batch(3)
    logits = tiny_model.apply(PARAMS, batch.tokens, images=batch.images)
    losses = cross_entropies(logits, batch.tokens, batch.is_target)
    total, count = jax.jit(target_losses, static_argnums=0)(MODEL, PARAMS, batch)
    assert count == len(losses) == batch.is_target.sum()
    np.testing.assert_allclose(total, sum(losses), rtol=1e-5)


def test_the_first_token_of_a_caption_is_predicted_by_the_last_visual_token():
    batch = make_batch(3)._replace(is_target=jnp.ones((3, 9), bool))
    logits = tiny_model.apply(PARAMS, batch.tokens, images=batch.images)
    losses = cross_entropies(logits, batch.tokens, batch.is_target)
    total, count = jax.jit(target_losses, static_argnums=0)(MODEL, PARAMS, batch)
    assert count == len(losses) == 27
    np.testing.assert_allclose(total, sum(losses), rtol=1e-5)


def test_a_mixed_batch_is_the_token_weighted_mean_of_its_rows_alone():
    """Rows of many lengths with and without an image, each alone without padding and, if text alone, without pixels.

    Questions and captions: where no image stands before it, nothing predicts the first token.
    """
    turns = (Turn("human", "<image>\nWhich digit?"), Turn("gpt", "7"), Turn("human", "Sure?"), Turn("gpt", "Yes, a 7"))
    records = [
        (Record("image", png("red"), turns), "chat"),
        (Record("text", None, turns[2:]), "chat"),
        (Record("caption", png("blue"), turns[:2]), "caption"),
        (Record("caption of nothing", None, turns[2:]), "caption"),
    ]
    tokenizer = Tokenizer.train([], 257)
    samples = [make_sample(record, tokenizer, MODEL.config, 200, form) for record, form in records]
    batch = jax.tree.map(jnp.asarray, collate(samples, MODEL.config, pad_id=tokenizer.eos_id, length=130))
    assert batch.image_mask.tolist() == [True, False, True, False]

    means, counts = [], []
    for sample in samples:
        tokens, is_target, pixels = jax.tree.map(lambda a: a[None], sample)
        logits = tiny_model.apply(PARAMS, jnp.asarray(tokens), images=jax.tree.map(jnp.asarray, pixels))
        if pixels is None:
            is_target[0, 0] = False
        losses = cross_entropies(logits, tokens, is_target)
        means.append(np.mean(losses))
        counts.append(len(losses))
    assert counts == [2 + 9, 9, 2, 9 - 1]
    total, count = jax.jit(target_losses, static_argnums=0)(MODEL, PARAMS, batch)
    assert count == sum(counts)
    np.testing.assert_allclose(total / count, np.average(means, weights=counts), rtol=1e-5)


def test_a_language_model_alone_never_predicts_the_first_token():
    model = MLMamba(MODEL.config.replace(vision=(), connector=None))
    batch = make_batch(2)._replace(is_target=jnp.ones((2, 9), bool), images={}, image_mask=jnp.zeros(2, bool))
    params = {"language": PARAMS["language"]}
    losses = cross_entropies(
        tiny_model.apply(params, batch.tokens, model=model), batch.tokens, batch.is_target.at[:, 0].set(False)
    )
    total, count = jax.jit(target_losses, static_argnums=0)(model, params, batch)
    assert count == len(losses) == 16
    np.testing.assert_allclose(total, sum(losses), rtol=1e-5)


def test_the_gradient_is_the_slope_of_the_loss():
    batch = make_batch(2)
    loss_and_gradient = jax.jit(lambda params: mean_loss_and_gradient(MODEL, params, batch)[:2])
    loss, gradient = loss_and_gradient(PARAMS)
    rng = np.random.default_rng(0)
    direction = jax.tree.map(lambda a: rng.standard_normal(a.shape).astype(a.dtype), PARAMS)
    expected = sum(np.vdot(g, d) for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True))
    step = 1e-4

    def moved(sign: float) -> float:
        params = jax.tree.map(lambda a, d: a + sign * step * d, PARAMS, direction)
        return float(loss_and_gradient(params)[0])

    np.testing.assert_allclose((moved(1) - moved(-1)) / (2 * step), expected, rtol=0.03)
    assert loss > 0


@pytest.mark.parametrize("parts", [pytest.param(2, marks=pytest.mark.full), 4])
def test_micro_batches_weigh_every_token_the_same(parts):
    batch = make_batch()
    whole = jax.jit(lambda p: mean_loss_and_gradient(MODEL, p, batch))(PARAMS)
    cut = jax.jit(lambda p: mean_loss_and_gradient(MODEL, p, batch, parts))(PARAMS)
    np.testing.assert_allclose(cut[0], whole[0], rtol=1e-5)
    assert cut[2] == whole[2] == batch.is_target.sum()
    for a, b in zip(jax.tree.leaves(cut[1]), jax.tree.leaves(whole[1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_rows_without_an_image_do_not_see_the_others_pixels():
    batch = make_batch(4)
    mask = jnp.asarray([True, False, True, False])
    black = {name: jnp.where(mask[:, None, None, None], a, 0) for name, a in batch.images.items()}
    losses = [
        target_losses(MODEL, PARAMS, batch._replace(images=images, image_mask=mask))[0]
        for images in (batch.images, black)
    ]
    np.testing.assert_array_equal(*losses)
    assert losses[0] != target_losses(MODEL, PARAMS, batch)[0]


def samples_of(n: int, max_tokens: int = 200) -> list:
    """Samples of very different lengths, every third of them text alone, and captions with and without an image."""
    tokenizer, made = Tokenizer.train([], 257), []
    for i in range(n):
        turns = (Turn("human", "<image>\n" + "Which? " * (i % 4)), Turn("gpt", "It is " + "7" * (3 * i % 8)))
        turns += (Turn("human", "Sure?"), Turn("gpt", "Yes")) if i % 2 else ()
        picture = None if i % 3 == 2 else png(("red", "blue", "green", "white")[i % 4])
        form = "caption" if i in (2, 4) else "chat"
        made.append(make_sample(Record(f"r{i}", picture, turns), tokenizer, MODEL.config, max_tokens, form))
    return made


def test_a_packed_batch_gives_what_its_samples_give_in_rows_of_their_own():
    """Several images in a row, text alone between them, padding behind, a row of text and one without anything; and cut into
    micro-batches."""
    samples = samples_of(6)
    sizes = [len(s.tokens) + tiny_model.N_VISUAL * (s.pixels is not None) for s in samples]
    rows = [[samples[0], samples[2], samples[1]], [samples[4], samples[3]], [samples[5]], []]
    length = max(sizes[0] + sizes[2] + sizes[1], sizes[4] + sizes[3]) + 5
    packed = jax.tree.map(jnp.asarray, collate_packed(rows, MODEL.config, 0, length, image_slots=3))
    assert packed.images["siglip"].shape == (4, 3, 32, 32, 3)
    assert (packed.image_starts >= 0).sum(1).tolist() == [2, 2, 0, 0]
    alone = jax.tree.map(jnp.asarray, collate(samples, MODEL.config, 0, max(len(s.tokens) for s in samples)))

    loss, gradient, count = jax.jit(lambda p: mean_loss_and_gradient(MODEL, p, packed, 2))(PARAMS)
    expected, expected_gradient, expected_count = jax.jit(lambda p: mean_loss_and_gradient(MODEL, p, alone))(PARAMS)
    assert count == expected_count and count > 20
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected_gradient), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * float(jnp.abs(b).max()) + 1e-8)


def test_a_row_that_is_too_full_is_refused():
    samples = samples_of(2)
    with pytest.raises(InputError, match=r"got \d+ positions and 2 images, expected at most 400 and 1"):
        collate_packed([samples], MODEL.config, 0, 400, image_slots=1)
    with pytest.raises(InputError, match="expected at most 50 and 2"):
        collate_packed([samples], MODEL.config, 0, 50, image_slots=2)


def test_tokens_that_are_read_are_counted():
    samples = samples_of(4)
    text = sum(len(sample.tokens) for sample in samples)
    batches = (
        collate(samples, MODEL.config, 0, 200),
        collate_packed([samples[:2], samples[2:]], MODEL.config, 0, 300, image_slots=2),
    )
    for batch in batches:
        assert n_positions(batch, MODEL.config) == text + 3 * tiny_model.N_VISUAL
    assert n_positions(collate(samples[:2], MODEL.config, 0, 200), MODEL.config) == sum(
        len(sample.tokens) + tiny_model.N_VISUAL for sample in samples[:2]
    )
    text_only = collate([samples[2]], MODEL.config, 0, 200, has_image=False)
    assert n_positions(text_only, MODEL.config) == len(samples[2].tokens)
