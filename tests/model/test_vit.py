"""Vision encoders against a plain numpy transformer that runs every block one after the other."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ml_mamba_jax.config import VISION_ENCODERS, ViTConfig
from ml_mamba_jax.vision import VisionEncoder
from ml_mamba_jax.vit import ViT
from tests import tiny_model

erf = np.vectorize(math.erf)


def vit_by_hand(p: dict, image: np.ndarray, config: ViTConfig, scaled: bool) -> np.ndarray:
    """One uint8 image [y x 3] -> features [patches width], block by block, head by head, float64."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), p)
    pixels = (image.astype(np.float64) / 255 - np.asarray(config.mean)) / np.asarray(config.std)
    patch, side = config.patch_size, config.image_size // config.patch_size

    def linear(name, layer, x):
        return x @ layer[name]["kernel"] + layer[name]["bias"]

    def norm(layer, x):
        mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        return (x - mean) / np.sqrt(var + 1e-6) * layer["scale"] + layer["bias"]

    patches = [
        pixels[patch * i : patch * (i + 1), patch * j : patch * (j + 1)].reshape(-1)
        for i in range(side)
        for j in range(side)
    ]
    x = linear("patch_embed", p, np.stack(patches)) + p["pos_embed"]
    n_prefix = 0
    if "prefix_tokens" in p:
        n_prefix = len(p["prefix_tokens"])
        x = np.concatenate([p["prefix_tokens"], x])
    n_blocks = p["blocks"]["qkv"]["kernel"].shape[0]
    assert n_blocks == config.depth - 1  # features of the second-to-last block
    for i in range(n_blocks):
        layer = jax.tree.map(lambda a, i=i: a[i], p["blocks"])
        qkv = linear("qkv", layer, norm(layer["attention_norm"], x))
        q, k, v = np.split(qkv, 3, axis=-1)
        heads = []
        for q_h, k_h, v_h in zip(*(np.split(a, config.n_heads, axis=-1) for a in (q, k, v)), strict=True):
            scores = np.exp(q_h @ k_h.T / math.sqrt(q_h.shape[-1]))
            heads.append(scores / scores.sum(-1, keepdims=True) @ v_h)
        branch = linear("attention_out", layer, np.concatenate(heads, axis=-1))
        x = x + (branch * layer["attention_scale"] if scaled else branch)
        hidden = linear("mlp_in", layer, norm(layer["mlp_norm"], x))
        branch = linear("mlp_out", layer, hidden * 0.5 * (1 + erf(hidden / math.sqrt(2))))
        x = x + (branch * layer["mlp_scale"] if scaled else branch)
    return x[n_prefix:]


def encoders():
    return {config.name: config for config in tiny_model.MODEL.config.vision}


@pytest.mark.parametrize(("name", "scaled"), [("dinov2", True), ("siglip", False)])
def test_features_are_those_of_a_plain_transformer(name, scaled):
    config, params = encoders()[name], tiny_model.params()["vision"][name]
    pixels = tiny_model.pixels(2)[name]
    features = jax.jit(ViT(config, jnp.dtype("float32")).apply)({"params": params}, pixels)
    assert features.shape == (2, 16, config.width)
    expected = np.stack([vit_by_hand(params, np.asarray(image), config, scaled) for image in pixels])
    np.testing.assert_allclose(features, expected, atol=2e-5, rtol=1e-4)


def test_pixels_beyond_the_last_whole_patch_are_not_seen():
    config = ViTConfig(name="odd", image_size=21, patch_size=8, width=16, depth=2, n_heads=2, mlp_dim=32)
    assert config.grid == (2, 2) and VISION_ENCODERS["siglip-vit-so400m-384px"].grid == (27, 27)
    model = ViT(config, jnp.dtype("float32"))
    pixels = jax.random.randint(jax.random.key(0), (1, 21, 21, 3), 0, 256).astype(jnp.uint8)
    params = jax.jit(model.init)(jax.random.key(1), pixels)
    run = jax.jit(model.apply)
    features = run(params, pixels)
    np.testing.assert_array_equal(run(params, pixels.at[:, 16:].set(0).at[:, :, 16:].set(0)), features)
    assert (run(params, pixels.at[:, 15].set(0)) != features).any()


def test_uint8_equals_floats_that_were_normalised_beforehand():
    params = {"params": tiny_model.params()["vision"]}
    model = VisionEncoder(tiny_model.MODEL.config.vision, jnp.dtype("float32"))
    pixels = tiny_model.pixels(1)
    normalised = {
        name: (pixels[name] / 255.0 - np.asarray(config.mean)[None, None, None])
        / np.asarray(config.std)[None, None, None]
        for name, config in encoders().items()
    }
    normalised = {name: jnp.asarray(a, jnp.float32) for name, a in normalised.items()}
    run = jax.jit(model.apply)
    features = run(params, pixels)
    np.testing.assert_allclose(run(params, normalised), features, atol=1e-5)
    # One uint8 picture serves all encoders; dinov2's channels come first.
    shared = run(params, dict.fromkeys(pixels, pixels["dinov2"]))
    np.testing.assert_allclose(model.apply(params, pixels["dinov2"]), shared, atol=1e-5)
    np.testing.assert_array_equal(shared[..., :64], features[..., :64])
    assert shared.shape == (1, 16, 64 + 48) and (shared[..., 64:] != features[..., 64:]).any()


def test_wrong_images_are_refused():
    model, params = VisionEncoder(tiny_model.MODEL.config.vision, jnp.dtype("float32")), tiny_model.params()["vision"]
    pixels = tiny_model.pixels(1)
    with pytest.raises(ValueError, match=r"got pictures for \['dinov2'\], expected one for 'siglip'"):
        model.apply({"params": params}, {"dinov2": pixels["dinov2"]})
    with pytest.raises(ValueError, match="got one float32 array for all encoders, expected uint8"):
        model.apply({"params": params}, pixels["dinov2"].astype(jnp.float32))
    with pytest.raises(ValueError, match=r"images\['dinov2'\]: got shape \(1, 31, 32, 3\), expected \[b 32 32 3\]"):
        model.apply({"params": params}, pixels["dinov2"][:, 1:])
