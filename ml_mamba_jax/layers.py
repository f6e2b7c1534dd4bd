"""Small pieces shared by the encoders, the connector and the language model: dense layers, norms, initialisers.

Every parameter carries logical axis names (`embed`, `inner`, `heads`, `mlp`, `vocab`, ...); `ml_mamba_jax.sharding`
maps them to mesh axes. Parameters are float32, computation is in `dtype`.
"""

from collections.abc import Sequence
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

uniform_fan_in = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
"""U(-1/sqrt(fan_in), 1/sqrt(fan_in)): PyTorch's default for linear layers."""

ACTIVATIONS = {
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}


def with_axes(initializer: nn.initializers.Initializer, *axes: str | None) -> nn.initializers.Initializer:
    """Attach logical axis names to what `initializer` makes."""
    return nn.with_logical_partitioning(initializer, axes)


def dense(
    features: int,
    axes: Sequence[str | None],
    *,
    name: str,
    dtype: jnp.dtype,
    use_bias: bool = True,
    kernel_init: nn.initializers.Initializer = uniform_fan_in,
) -> nn.Dense:
    """A linear layer whose kernel [in out] has logical `axes`; the bias takes the last of them and starts at zero."""
    return nn.Dense(
        features,
        use_bias=use_bias,
        dtype=dtype,
        kernel_init=with_axes(kernel_init, *axes),
        bias_init=with_axes(nn.initializers.zeros, axes[-1]),
        name=name,
    )


LORA_NAMES = ("lora_a", "lora_b")


class LowRankDense(nn.Module):
    """x @ (kernel + scale lora_a @ lora_b), the sum never made (LoRA, arXiv 2106.09685): lora_a [in rank], lora_b [rank out].

    lora_b starts at zero, and with it the addition.
    """

    features: int
    axes: tuple[str | None, str | None]
    rank: int
    scale: float
    dtype: jnp.dtype
    kernel_init: nn.initializers.Initializer = uniform_fan_in

    @nn.compact
    def __call__(self, x: Array) -> Array:
        (inputs, outputs), width = self.axes, x.shape[-1]
        kernel = self.param("kernel", with_axes(self.kernel_init, inputs, outputs), (width, self.features))
        a = self.param("lora_a", with_axes(uniform_fan_in, inputs, None), (width, self.rank))
        b = self.param("lora_b", with_axes(nn.initializers.zeros, None, outputs), (self.rank, self.features))
        x, kernel, a, b = (array.astype(self.dtype) for array in (x, kernel, a, b))
        return x @ kernel + self.scale * ((x @ a) @ b)


def layer_norm(eps: float, *, name: str, dtype: jnp.dtype) -> nn.LayerNorm:
    """LayerNorm in float32 with the two-pass variance that PyTorch uses."""
    return nn.LayerNorm(
        epsilon=eps,
        dtype=dtype,
        use_fast_variance=False,
        scale_init=with_axes(nn.initializers.ones, "norm"),
        bias_init=with_axes(nn.initializers.zeros, "norm"),
        name=name,
    )


def rms_norm(eps: float, *, name: str, dtype: jnp.dtype) -> nn.RMSNorm:
    """RMSNorm in float32."""
    return nn.RMSNorm(epsilon=eps, dtype=dtype, scale_init=with_axes(nn.initializers.ones, "norm"), name=name)


UNROLLED_LAYERS = 4
"""A stack of at most so many layers becomes straight code: on CPU the backward pass of a loop takes about twice as long."""


Remat = bool | Literal["projections"]
"""What of a block the backward pass computes again: nothing (False), all of it (True), all but its projections."""


def stack_layers(block: type[nn.Module], n_layers: int, *, remat: Remat, in_axes: Sequence = (0,)) -> type[nn.Module]:
    """`n_layers` blocks one after the other as one module, every parameter with a first axis `layers`; compiled once.

    Args:
        block: its call takes and returns (carry, per-layer values).
        remat: recompute each block in the backward pass instead of keeping its activations, see `Remat`.
        in_axes: of the arguments after the carry: 0 for one with an entry for each layer, `nn.broadcast` for the same in all.
    """
    if remat:
        # Products without a batch axis are those with weights: the large ones, and few.
        keep = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if remat == "projections" else None
        block = nn.remat(block, prevent_cse=False, policy=keep)
    return nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=tuple(in_axes),
        length=n_layers,
        unroll=n_layers if n_layers <= UNROLLED_LAYERS else 1,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
