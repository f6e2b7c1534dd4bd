"""The tiny preset with parameters in which nothing is zero or one by initialisation, and inputs for it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from ml_mamba_jax.config import MLMambaConfig
from ml_mamba_jax.model import MLMamba

MODEL = MLMamba(MLMambaConfig.named("tiny"))
N_VISUAL = MODEL.config.n_visual_tokens


@functools.cache
def params() -> dict:
    """Initial parameters plus noise, so that no bias, scale or skip can be forgotten unnoticed."""
    initial = jax.jit(lambda: MODEL.init(jax.random.key(0), **MODEL.dummy_inputs()))()["params"]
    leaves, tree = jax.tree.flatten(initial)
    rng = np.random.default_rng(0)
    noisy = [a + jnp.asarray(0.05 * rng.standard_normal(a.shape), a.dtype) for a in leaves]
    return jax.tree.unflatten(tree, noisy)


def tokens(batch: int, length: int, seed: int = 0) -> jax.Array:
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.integers(0, MODEL.config.language.vocab_size, (batch, length)), jnp.int32)


def pixels(batch: int, seed: int = 0) -> dict[str, jax.Array]:
    """Another uint8 picture for each row and encoder."""
    rng = np.random.default_rng(seed)
    return {
        encoder.name: jnp.asarray(rng.integers(0, 256, (batch, encoder.image_size, encoder.image_size, 3)), jnp.uint8)
        for encoder in MODEL.config.vision
    }


@functools.partial(jax.jit, static_argnames=("method", "model"))
def apply(params, *args, model=MODEL, method="__call__", **kwargs):
    return model.apply({"params": params}, *args, method=method, **kwargs)
