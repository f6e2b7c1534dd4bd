"""The last part of the connector: from the scan's width to the language model's, where LDPv2 also pools the grid."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

import pallas_kernels as pk
from ml_mamba_jax.config import ConnectorConfig
from ml_mamba_jax.layers import ACTIVATIONS, dense, uniform_fan_in, with_axes
from ml_mamba_jax.typing import Hidden


def project(
    x: Float[Array, "b l v"], config: ConnectorConfig, grid: tuple[int, int], dtype: jnp.dtype
) -> Float[Array, "b l_out d"]:
    """Features -> visual tokens, by the form that `ConnectorConfig.projector` names. Call it inside a compact method."""
    d, hidden = config.mixer.d_model, 4 * x.shape[-1]
    widths = {
        "linear": (d,),
        "gelu-mlp": (d, d),
        "fused-gelu-mlp": (hidden, d, d),
        "fused-ldpnet": (hidden, d),
    }[config.projector]
    # The reference initialises this form alone by Xavier, the others as PyTorch does.
    kernel_init = nn.initializers.xavier_normal() if config.projector == "fused-gelu-mlp" else uniform_fan_in
    for i, width in enumerate(widths):
        axes = ("mlp", "embed") if i == 1 else ("embed", "mlp")
        x = x if i == 0 else ACTIVATIONS["gelu"](x)
        x = dense(width, axes, name=f"projector_{i}", dtype=dtype, kernel_init=kernel_init)(x)
        x = pk.keep_split(x, f"b n {'d' if axes[1] == 'embed' else 'c'}")
    return _pool(x, grid, config.pooled_grid, dtype) if config.projector == "fused-ldpnet" else x


def _pool(
    x: Hidden, grid: tuple[int, int], pooled_grid: tuple[int, int], dtype: jnp.dtype
) -> Float[Array, "b l_out d"]:
    """Average to `pooled_grid`, then add a depthwise 3 x 3 convolution of that: a positional encoding generator."""
    to_rows, to_columns = (jnp.asarray(pooling_matrix(*sizes), dtype) for sizes in zip(grid, pooled_grid, strict=True))
    width = x.shape[-1]
    x = jnp.einsum("byxd,ry,cx->brcd", x.reshape(x.shape[0], *grid, width), to_rows, to_columns)
    x = x + nn.Conv(
        width,
        (3, 3),
        padding=1,
        feature_group_count=width,
        dtype=dtype,
        kernel_init=with_axes(uniform_fan_in, None, None, None, "embed"),
        bias_init=with_axes(nn.initializers.zeros, "embed"),
        name="projector_position",
    )(x)
    return x.reshape(x.shape[0], -1, width)


def pooling_matrix(n_inputs: int, n_outputs: int) -> np.ndarray:
    """float64 [n_outputs n_inputs]: adaptive average pooling as PyTorch's, whose bins may overlap and differ in size by one."""
    outputs, inputs = np.arange(n_outputs)[:, None], np.arange(n_inputs)[None]
    start = outputs * n_inputs // n_outputs
    end = -(-(outputs + 1) * n_inputs // n_outputs)
    return ((start <= inputs) & (inputs < end)) / (end - start)
