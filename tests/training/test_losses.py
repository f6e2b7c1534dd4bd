"""The loss and its gradient, against plain NumPy and across ways to cut a batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ml_mamba_jax.data.samples import Batch
from ml_mamba_jax.training.losses import mean_loss_and_gradient, target_losses
from tests import tiny_model

MODEL, PARAMS = tiny_model.MODEL, tiny_model.params()


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


def test_the_loss_is_the_cross_entropy_of_the_targets():
    batch = make_batch(3)
    logits = np.asarray(tiny_model.apply(PARAMS, batch.tokens, images=batch.images), np.float64)
    losses = []
    for row, position in zip(*np.nonzero(batch.is_target), strict=True):
        before = logits[row, tiny_model.N_VISUAL + position - 1]
        losses.append(np.log(np.exp(before).sum()) - before[batch.tokens[row, position]])
    total, count = target_losses(MODEL, PARAMS, batch)
    assert count == len(losses) == batch.is_target.sum()
    np.testing.assert_allclose(total, sum(losses), rtol=1e-5)


def test_the_gradient_is_the_slope_of_the_loss():
    batch = make_batch(2)
    loss, gradient, _ = mean_loss_and_gradient(MODEL, PARAMS, batch)
    rng = np.random.default_rng(0)
    direction = jax.tree.map(lambda a: rng.standard_normal(a.shape).astype(a.dtype), PARAMS)
    expected = sum(np.vdot(g, d) for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True))
    step = 1e-4

    def moved(sign: float) -> float:
        params = jax.tree.map(lambda a, d: a + sign * step * d, PARAMS, direction)
        return float(mean_loss_and_gradient(MODEL, params, batch)[0])

    np.testing.assert_allclose((moved(1) - moved(-1)) / (2 * step), expected, rtol=0.03)
    assert loss > 0


@pytest.mark.parametrize("parts", [2, 4])
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
