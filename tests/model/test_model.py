"""The whole model: one result however the input is cut, padded or batched; gradients; compute dtypes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ml_mamba_jax.config import MLMambaConfig
from ml_mamba_jax.model import MLMamba
from tests.tiny_model import MODEL, N_VISUAL, apply, params, pixels, tokens

VOCABULARY = MODEL.config.language.padded_vocab_size
SCAN_PARAMETERS = ("A_log", "D", "conv_bias", "conv_weight", "dt_bias")
CLOSE = {"atol": 2e-5, "rtol": 2e-5}


def close_states(a, b):
    for x, y in zip(a, b, strict=True):
        np.testing.assert_allclose(x, y, **CLOSE)


def test_forward_shapes_and_order():
    text, images = tokens(2, 9), pixels(2)
    logits = apply(params(), text, images=images)
    assert logits.shape == (2, N_VISUAL + 9, VOCABULARY) and logits.dtype == jnp.float32
    visual = apply(params(), images, method="encode_images")
    assert visual.shape == (2, N_VISUAL, 96)
    # The image stands before the text: the last token changes only the last logits, the image changes them all.
    changed = apply(params(), text.at[:, -1].add(1) % 512, images=images)
    np.testing.assert_allclose(changed[:, :-1], logits[:, :-1], **CLOSE)
    assert np.abs(changed[:, -1] - logits[:, -1]).max() > 0.1
    other = apply(params(), text, images=pixels(2, seed=9))
    assert (np.abs(other - logits).max(axis=(0, 2)) > 1e-3).all()
    hidden = apply(params(), text, images=images, method="hidden")
    np.testing.assert_allclose(apply(params(), hidden, method="logits"), logits, **CLOSE)


def test_text_only_equals_the_language_model_alone():
    text = tokens(2, 9)
    alone = MLMamba(MLMambaConfig(language=MODEL.config.language))
    logits = apply(params(), text)
    assert logits.shape == (2, 9, VOCABULARY)
    np.testing.assert_array_equal(logits, apply({"language": params()["language"]}, text, model=alone))
    with pytest.raises(ValueError, match="this model has no image encoders"):
        apply({"language": params()["language"]}, text, images=pixels(2), model=alone)


def test_image_mask_hides_the_image_of_a_row():
    text, images = tokens(3, 9), pixels(3)
    mask = jnp.asarray([True, False, True])
    logits = apply(params(), text, images=images, image_mask=mask)
    np.testing.assert_allclose(logits[::2], apply(params(), text, images=images)[::2], **CLOSE)
    np.testing.assert_allclose(logits[1, N_VISUAL:], apply(params(), text)[1], **CLOSE)


def test_prefill_ends_where_the_forward_pass_ends():
    text, images = tokens(2, 9), pixels(2)
    last, state = apply(params(), text, images=images, method="prefill")
    np.testing.assert_allclose(last, apply(params(), text, images=images)[:, -1], **CLOSE)
    n_layers = MODEL.config.language.n_layers
    assert state.ssm.shape == (n_layers, 2, 6, 32, 32) and state.conv.shape == (n_layers, 2, 3, 256)


def test_prefill_in_pieces_equals_one_shot():
    text, images = tokens(2, 9), pixels(2)
    expected, expected_state = apply(params(), text, images=images, method="prefill")
    # Pieces of one token take the step kernels, pieces shorter than the convolution reach back over two of them.
    first, *rest = np.split(text, (1, 2, 4), axis=1)
    last, state = apply(params(), jnp.asarray(first), images=images, method="prefill")
    for piece in rest:
        last, state = apply(params(), jnp.asarray(piece), state=state, method="prefill")
    np.testing.assert_allclose(last, expected, **CLOSE)
    close_states(state, expected_state)


def test_padded_pieces_equal_one_shot():
    """As a chat reads its turns: every piece padded on the right, rows of different lengths."""
    text, images = tokens(2, 12), pixels(2)
    cuts = ((5, 4), (2, 7))  # lengths of the first and second piece of each row
    state, last = None, None
    for i in range(2):
        piece = np.full((2, 8), 77, np.int32)
        for row, lengths in enumerate(cuts):
            start = sum(lengths[:i])
            piece[row, : lengths[i]] = text[row, start : start + lengths[i]]
        options = {"images": images} if i == 0 else {"state": state}
        lengths = jnp.asarray([row[i] for row in cuts])
        last, state = apply(params(), jnp.asarray(piece), lengths=lengths, method="prefill", **options)
    for row, lengths in enumerate(cuts):
        one = {name: a[row : row + 1] for name, a in images.items()}
        expected, expected_state = apply(params(), text[row : row + 1, : sum(lengths)], images=one, method="prefill")
        np.testing.assert_allclose(last[row : row + 1], expected, **CLOSE)
        close_states(jax.tree.map(lambda a, row=row: a[:, row : row + 1], state), expected_state)


def test_steps_equal_the_forward_pass():
    text, images = tokens(2, 9), pixels(2)
    expected = apply(params(), text, images=images)[:, N_VISUAL:]
    last, state = apply(params(), text[:, :1], images=images, method="prefill")
    got = [last]
    for t in range(1, 9):
        last, state = apply(params(), text[:, t], state, method="step")
        got.append(last)
    np.testing.assert_allclose(jnp.stack(got, axis=1), expected, **CLOSE)
    _, expected_state = apply(params(), text, images=images, method="prefill")
    close_states(state, expected_state)


def test_a_padded_batch_with_missing_images_equals_each_row_alone():
    text, images = tokens(4, 9), pixels(4)
    lengths, mask = (9, 3, 3, 9), (True, False, True, False)
    last, state = apply(
        params(), text, images=images, lengths=jnp.asarray(lengths), image_mask=jnp.asarray(mask), method="prefill"
    )
    for row in range(4):
        one = {name: a[row : row + 1] for name, a in images.items()} if mask[row] else None
        expected, expected_state = apply(params(), text[row : row + 1, : lengths[row]], images=one, method="prefill")
        np.testing.assert_allclose(last[row : row + 1], expected, **CLOSE)
        close_states(jax.tree.map(lambda a, row=row: a[:, row : row + 1], state), expected_state)


def test_packed_sequences_do_not_see_each_other():
    text, images = tokens(1, 9), pixels(1)
    packed = apply(params(), text, images=images, segment_ids=jnp.asarray([[0, 0, 0, 0, 1, 1, 1, -1, -1]]))
    first = apply(params(), text[:, :4], images=images)
    np.testing.assert_allclose(packed[:, : N_VISUAL + 4], first, **CLOSE)
    np.testing.assert_allclose(packed[:, N_VISUAL + 4 : N_VISUAL + 7], apply(params(), text[:, 4:7]), **CLOSE)


@functools.partial(jax.jit, static_argnums=1)
@jax.value_and_grad
def loss_and_gradient(params, model, text, images):
    logits = model.apply({"params": params}, text, images=images)[:, N_VISUAL - 1 : -1]
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), text[..., None], axis=-1))


def test_every_parameter_of_every_layer_learns_and_remat_changes_nothing():
    text, images = tokens(2, 9), pixels(2)
    value, grads = loss_and_gradient(params(), MODEL, text, images)
    assert np.isfinite(value)
    for path, grad in jax.tree_util.tree_flatten_with_path(grads)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        assert np.isfinite(grad).all(), name
        layers = grad if "/blocks/" in name else grad[None]
        if name.startswith("connector/blocks/mixer") and name.split("/")[-1] in SCAN_PARAMETERS:
            layers = layers.reshape(-1, *layers.shape[2:])  # each direction of each layer
        for i, layer in enumerate(layers):
            assert np.abs(layer).max() > 1e-7, f"{name}, layer {i}: the gradient is zero"

    for remat in (True, "projections"):
        again, regrads = loss_and_gradient(params(), MLMamba(MODEL.config, remat=remat), text, images)
        np.testing.assert_allclose(again, value, rtol=1e-6)
        for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(regrads), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-4)


def test_gradient_is_the_slope_of_the_loss():
    text, images = tokens(2, 9), pixels(2)
    _, grads = loss_and_gradient(params(), MODEL, text, images)
    rng = np.random.default_rng(5)
    direction = jax.tree.map(lambda a: jnp.asarray(rng.standard_normal(a.shape), a.dtype), params())
    h = 2e-4
    ahead, behind = (
        loss_and_gradient(jax.tree.map(lambda a, d, t=t: a + t * d, params(), direction), MODEL, text, images)[0]
        for t in (h, -h)
    )
    slope = sum(np.vdot(g, d) for g, d in zip(jax.tree.leaves(grads), jax.tree.leaves(direction), strict=True))
    np.testing.assert_allclose(slope, (ahead - behind) / (2 * h), rtol=2e-2)


def test_bfloat16_is_close_and_keeps_states_in_float32():
    model = MLMamba(MODEL.config.replace(dtype="bfloat16"))
    text, images = tokens(2, 9), pixels(2)
    expected, _ = apply(params(), text, images=images, method="prefill")
    logits, state = apply(params(), text, images=images, model=model, method="prefill")
    error = np.sqrt(np.mean(np.square(logits - expected))) / np.std(expected)
    assert 1e-4 < error < 0.1  # above zero: it did compute in half precision
    last, state = apply(params(), text[:, -1], state, model=model, method="step")
    assert logits.dtype == last.dtype == state.ssm.dtype == jnp.float32 and state.conv.dtype == jnp.bfloat16


def test_model_is_a_hashable_value():
    assert hash(MODEL) == hash(MLMamba(MLMambaConfig.named("tiny"))) and MLMamba(MLMambaConfig.named("tiny")) == MODEL
    assert type(params()) is dict and all(isinstance(a, jax.Array) for a in jax.tree.leaves(params()))


def test_configs_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="got language and vision, expected all of language, vision and connector"):
        MODEL.config.replace(connector=None)
    with pytest.raises(ValueError, match="unknown model 'ml-mamba-3bb'; did you mean 'ml-mamba-3b'"):
        MLMambaConfig.named("ml-mamba-3bb")
    with pytest.raises(ValueError, match="expected the same grid for every encoder"):
        MODEL.config.replace(vision=(MODEL.config.vision[0], MLMambaConfig.named("ml-mamba-3b").vision[1]))
    with pytest.raises(ValueError, match="connector width 96, expected the language model's 768"):
        MODEL.config.replace(language=MLMambaConfig.named("130m").language)
