"""Attention against a plain one in float64, on whatever device there is; `-m gpu` insists on cuDNN's kernel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ml_mamba_jax.attention import attention

SHAPE = (2, 29, 3, 24)  # b l h p


def by_hand(q, k, v):
    q, k, v = (np.asarray(a, np.float64).swapaxes(1, 2) for a in (q, k, v))
    scores = q @ k.swapaxes(2, 3) / np.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return (weights / weights.sum(-1, keepdims=True) @ v).swapaxes(1, 2)


def arrays(dtype, n=3):
    return [jax.random.normal(jax.random.key(i), SHAPE).astype(dtype) for i in range(n)]


@pytest.mark.parametrize("dtype, bound", [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_attention(dtype, bound):
    q, k, v = arrays(dtype)
    actual = attention(q, k, v)
    assert actual.dtype == q.dtype
    np.testing.assert_allclose(np.asarray(actual, np.float64), by_hand(q, k, v), atol=bound, rtol=bound)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2, 729, 16, 72), (1, 734, 16, 64), (1, 63, 2, 128)])
def test_cudnn(shape):
    q, k, v, dy = (jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) for i in range(4))
    assert "cudnn" in jax.jit(attention).lower(q, k, v).as_text().lower()
    actual, pullback = jax.vjp(jax.jit(attention), q, k, v)
    np.testing.assert_allclose(np.asarray(actual, np.float64), by_hand(q, k, v), atol=2e-2, rtol=2e-2)
    _, expected = jax.vjp(jax.nn.dot_product_attention, *(a.astype(jnp.float32) for a in (q, k, v)))
    for a, b in zip(pullback(dy), expected(dy.astype(jnp.float32)), strict=True):
        error = jnp.linalg.norm(a.astype(jnp.float32) - b) / jnp.linalg.norm(b)
        assert error < 2e-2
