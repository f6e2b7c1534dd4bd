"""A token through all layers as a loop over layers around one layer's `mamba2_step`.

On NVIDIA GPUs XLA copies the weights of each layer out of their stacks before it multiplies by them, unless a flag takes
these products to cuBLAS early: see docs/generation.md, "Weights read where they lie".
"""

import functools
from collections.abc import Callable

import jax.numpy as jnp
from jax import lax

from pallas_kernels.sharded import keep_split

UNROLLED_LAYERS = 4
"""So few layers become straight code."""


def by_layers(mamba2_step: Callable) -> Callable:
    """`mamba2_layers_step` from a function for what lies between the projections; XLA does the rest."""

    def mamba2_layers_step(
        residual,
        conv_state,
        ssm_state,
        in_norm_weight,
        in_proj,
        conv_weight,
        A,
        out_proj,
        *,
        conv_bias=None,
        D=None,
        dt_bias=None,
        norm_weight=None,
        in_proj_scale=None,
        out_proj_scale=None,
        in_norm_eps=1e-5,
        active=None,
        **options,
    ):
        dtype = conv_state.dtype
        stacks = {
            "in_norm_weight": in_norm_weight,
            "in_proj": in_proj,
            "conv_weight": conv_weight,
            "A": A,
            "out_proj": out_proj,
            "conv_bias": conv_bias,
            "D": D,
            "dt_bias": dt_bias,
            "norm_weight": norm_weight,
            "in_proj_scale": in_proj_scale,
            "out_proj_scale": out_proj_scale,
        }
        stacks = {name: a for name, a in stacks.items() if a is not None}

        def one_layer(carry, inputs):
            residual, *states = carry
            residual = keep_split(residual, "b d")
            layer, weights = inputs
            u = rms_norm(residual, weights.pop("in_norm_weight"), in_norm_eps, dtype)
            zxbcdt = product(u, weights.pop("in_proj"), weights.pop("in_proj_scale", None))
            out_proj = weights.pop("out_proj"), weights.pop("out_proj_scale", None)
            y, *states = mamba2_step(*states, zxbcdt, **weights, layer=layer, active=active, **options)
            return (residual + product(y, *out_proj).astype(residual.dtype), *states), None

        layers = in_proj.shape[0]
        numbers = jnp.arange(layers, dtype=jnp.int32)
        unroll = layers if layers <= UNROLLED_LAYERS else 1
        carry, _ = lax.scan(one_layer, (residual, conv_state, ssm_state), (numbers, stacks), unroll=unroll)
        return carry

    return mamba2_layers_step


def product(x, weights, scale=None):
    """In the dtype of x, float32 without shortcuts; that of quantised weights is scaled in float32 at least."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    multiply = functools.partial(jnp.matmul, x, weights.astype(x.dtype), precision=precision)
    if scale is None:
        return multiply()
    y = multiply(preferred_element_type=jnp.promote_types(x.dtype, jnp.float32))
    return (y * scale[None]).astype(x.dtype)


def rms_norm(x, weight, eps: float, dtype):
    """Of rows, computed in float32 at least."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    return (x * (lax.rsqrt(mean + eps) * weight[None])).astype(dtype)
