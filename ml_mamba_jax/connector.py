"""The Mamba-2 Scan Connector: from concatenated patch features to visual tokens of the language model's width.

features -> Linear + GELU -> scan blocks -> norm -> projector. The default composition is that of the released model (arXiv
2407.19832; the first Linear + GELU is in its code, not in the paper); `ConnectorConfig.scan` names the others.
"""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

import pallas_kernels as pk
from ml_mamba_jax.config import ConnectorConfig
from ml_mamba_jax.layers import ACTIVATIONS, Remat, dense, layer_norm, rms_norm, stack_layers
from ml_mamba_jax.projector import project
from ml_mamba_jax.scan2d import ScanMixer
from ml_mamba_jax.typing import Hidden

_gelu = ACTIVATIONS["gelu"]


class ScanBlock(nn.Module):
    """One block of `ConnectorConfig.scan`: the mixer on a residual stream, in "advanced" followed by a SwiGLU."""

    config: ConnectorConfig
    grid: tuple[int, int]
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Hidden, _: None) -> tuple[Hidden, None]:
        scan, eps = self.config.scan, self.config.norm_eps
        x = pk.keep_split(x, "b n d")
        mixer = ScanMixer(self.config, self.grid, self.dtype, name="mixer")
        if scan == "basic":
            return x + mixer(rms_norm(eps, name="norm", dtype=self.dtype)(x)), None
        if scan == "vss-l2":
            return x + mixer(_gelu(x)), None
        x = x + mixer(x)  # without a norm before it
        return x + self._swiglu(layer_norm(eps, name="norm", dtype=self.dtype)(x)), None

    def _swiglu(self, x: Hidden) -> Hidden:
        """w3(silu(w1 x) * (w2 x)), all of the model's width."""

        def linear(name, axes=("embed", "mlp")):
            return dense(x.shape[-1], axes, name=name, dtype=self.dtype)

        x = pk.keep_split(x, "b n d")
        gated = pk.keep_split(nn.silu(linear("w1")(x)) * linear("w2")(x), "b n c")
        return linear("w3", ("mlp", "embed"))(gated)


class ScanConnector(nn.Module):
    """Patch features [b rows*columns c] -> visual tokens [b l_out d]: as many, or fewer with fused-ldpnet."""

    config: ConnectorConfig
    grid: tuple[int, int]
    dtype: jnp.dtype
    remat: Remat = False

    @nn.compact
    def __call__(self, features: Float[Array, "b l c"]) -> Float[Array, "b l_out d"]:
        config = self.config
        features = pk.keep_split(features, "b n d")
        x = features if config.scan == "none" else self._scan(features)
        return project(x, config, self.grid, self.dtype)

    def _scan(self, features: Float[Array, "b l c"]) -> Hidden:
        config = self.config
        x = dense(config.mixer.d_model, (None, "embed"), name="in_proj", dtype=self.dtype)(features)
        if config.scan != "vss-l2":  # there the GELU is inside the residual branch
            x = _gelu(x)
        blocks = stack_layers(ScanBlock, config.n_layers, remat=self.remat)
        x, _ = blocks(config, self.grid, self.dtype, name="blocks")(x, None)
        norm = rms_norm if config.scan == "basic" else layer_norm
        return norm(config.norm_eps, name="norm", dtype=self.dtype)(x)
