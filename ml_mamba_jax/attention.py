"""Attention of every position to every other: cuDNN's kernel on NVIDIA GPUs, which keeps the scores on the chip, else XLA."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

MOST_CHANNELS = 128  # of a head, in cuDNN


def attention(
    q: Float[Array, "b l h p"], k: Float[Array, "b l h p"], v: Float[Array, "b l h p"]
) -> Float[Array, "b l h p"]:
    """softmax(q k^T / sqrt(p)) v of each head; the softmax is float32."""
    if _is_for_cudnn(q):
        return _by_cudnn(q, k, v)
    return jax.nn.dot_product_attention(q, k, v)


def _is_for_cudnn(q) -> bool:
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    return jax.default_backend() == "gpu" and half and q.shape[-1] % 8 == 0 and q.shape[-1] <= MOST_CHANNELS


@jax.custom_vjp
def _by_cudnn(q, k, v):
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")


def _forward(q, k, v):
    return _by_cudnn(q, k, v), (q, k, v)


def _backward(arguments, cotangent):
    """XLA's: cuDNN adds up in any order, and two runs would differ."""
    return jax.vjp(jax.nn.dot_product_attention, *arguments)[1](cotangent)


_by_cudnn.defvjp(_forward, _backward)
