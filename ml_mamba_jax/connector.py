"""The Mamba-2 Scan Connector: from concatenated patch features to visual tokens of the language model's width.

features -> Linear + GELU -> scan blocks -> LayerNorm -> three-layer MLP. The composition is that of the released model
(arXiv 2407.19832; the first Linear + GELU is in its code, not in the paper).
"""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from ml_mamba_jax.config import ConnectorConfig
from ml_mamba_jax.layers import ACTIVATIONS, dense, layer_norm, stack_layers
from ml_mamba_jax.scan2d import ScanMixer
from ml_mamba_jax.typing import Hidden

_gelu = ACTIVATIONS["gelu"]


class ScanBlock(nn.Module):
    """x + mixer(x) without a norm before the mixer, then x + SwiGLU(layer_norm(x))."""

    config: ConnectorConfig
    grid: tuple[int, int]
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Hidden, _: None) -> tuple[Hidden, None]:
        x = x + ScanMixer(self.config, self.grid, self.dtype, name="mixer")(x)
        return x + self._swiglu(layer_norm(self.config.norm_eps, name="norm", dtype=self.dtype)(x)), None

    def _swiglu(self, x: Hidden) -> Hidden:
        """w3(silu(w1 x) * (w2 x)), all of the model's width."""

        def linear(name, axes=("embed", "mlp")):
            return dense(x.shape[-1], axes, name=name, dtype=self.dtype)

        return linear("w3", ("mlp", "embed"))(nn.silu(linear("w1")(x)) * linear("w2")(x))


class ScanConnector(nn.Module):
    """Patch features [b rows*columns c] -> visual tokens [b l d]."""

    config: ConnectorConfig
    grid: tuple[int, int]
    dtype: jnp.dtype
    remat: bool = False

    @nn.compact
    def __call__(self, features: Float[Array, "b l c"]) -> Hidden:
        width = self.config.mixer.d_model
        x = _gelu(dense(width, (None, "embed"), name="in_proj", dtype=self.dtype)(features))
        blocks = stack_layers(ScanBlock, self.config.n_layers, remat=self.remat)
        x, _ = blocks(self.config, self.grid, self.dtype, name="blocks")(x, None)
        x = layer_norm(self.config.norm_eps, name="norm", dtype=self.dtype)(x)
        return self._projector(x)

    def _projector(self, x: Hidden) -> Hidden:
        """d -> 4d -> d -> d with exact GELU between, Xavier-initialised."""
        width = x.shape[-1]
        xavier = nn.initializers.xavier_normal()
        layers = ((4 * width, ("embed", "mlp")), (width, ("mlp", "embed")), (width, ("embed", "mlp")))
        for i, (features, axes) in enumerate(layers):
            x = x if i == 0 else _gelu(x)
            x = dense(features, axes, name=f"projector_{i}", dtype=self.dtype, kernel_init=xavier)(x)
        return x
