"""One vision transformer for every encoder: patch features of its second-to-last block."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

import pallas_kernels as pk
from ml_mamba_jax.attention import attention
from ml_mamba_jax.config import ViTConfig
from ml_mamba_jax.layers import ACTIVATIONS, Remat, dense, layer_norm, stack_layers, with_axes
from ml_mamba_jax.typing import Pixels

_xavier = nn.initializers.xavier_uniform()


class ViTBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), each branch scaled where the config has layer scale."""

    config: ViTConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b l d"], _: None) -> tuple[Float[Array, "b l d"], None]:
        x = pk.keep_split(x, "b n d")
        x = x + self._scale("attention_scale", self._attention(self._norm("attention_norm")(x)))
        x = x + self._scale("mlp_scale", self._mlp(self._norm("mlp_norm")(x)))
        return x, None

    def _norm(self, name: str) -> nn.LayerNorm:
        return layer_norm(self.config.norm_eps, name=name, dtype=self.dtype)

    def _attention(self, x):
        config = self.config
        batch, length, width = x.shape
        qkv = self._dense(3 * width, ("embed", "heads"), "qkv")(x)
        q, k, v = jnp.moveaxis(qkv.reshape(batch, length, 3, config.n_heads, -1), 2, 0)
        q, k, v = (pk.keep_split(a, "b n h p") for a in (q, k, v))
        attended = attention(q, k, v).reshape(x.shape)
        return self._dense(width, ("heads", "embed"), "attention_out")(attended)

    def _mlp(self, x):
        hidden = pk.keep_split(self._dense(self.config.mlp_dim, ("embed", "mlp"), "mlp_in")(x), "b n c")
        return self._dense(x.shape[-1], ("mlp", "embed"), "mlp_out")(ACTIVATIONS[self.config.activation](hidden))

    def _dense(self, features: int, axes: tuple[str, str], name: str) -> nn.Dense:
        return dense(features, axes, name=name, dtype=self.dtype, kernel_init=_xavier)

    def _scale(self, name: str, x):
        if self.config.layer_scale is None:
            return x
        init = with_axes(nn.initializers.constant(self.config.layer_scale), "norm")
        return x * self.param(name, init, x.shape[-1:]).astype(self.dtype)[None, None]


class ViT(nn.Module):
    """Pixels [b y x 3] -> patch features [b rows*columns width], row-major, prefix tokens dropped, no final norm."""

    config: ViTConfig
    dtype: jnp.dtype
    remat: Remat = False

    @nn.compact
    def __call__(self, pixels: Pixels) -> Float[Array, "b l d"]:
        config = self.config
        size = config.image_size
        if pixels.shape[1:] != (size, size, 3):
            raise ValueError(
                f"images[{config.name!r}]: got shape {tuple(pixels.shape)}, expected [b {size} {size} 3]; "
                "prepare images with ml_mamba_jax.image.prepare_images"
            )
        x = dense(
            config.width,
            (None, "embed"),
            name="patch_embed",
            dtype=self.dtype,
            use_bias=not config.pre_norm,
            kernel_init=_xavier,
        )(_patches(normalise(pixels, config).astype(self.dtype), config))
        x = pk.keep_split(x, "b n d")
        x = x + self._embedding("pos_embed", config.n_patches)
        if config.n_prefix_tokens:
            prefix = self._embedding("prefix_tokens", config.n_prefix_tokens)
            if config.class_position:
                prefix = prefix.at[:, :1].add(self._embedding("class_pos_embed", 1))
            x = jnp.concatenate([jnp.broadcast_to(prefix, (x.shape[0], *prefix.shape[1:])), x], axis=1)
        if config.pre_norm:
            x = layer_norm(config.norm_eps, name="pre_norm", dtype=self.dtype)(x)
        n_needed = config.depth - 1  # the features are those of the second-to-last block
        blocks = stack_layers(ViTBlock, n_needed, remat=self.remat)
        x, _ = blocks(config, self.dtype, name="blocks")(x, None)
        return x[:, config.n_prefix_tokens :]

    def _embedding(self, name: str, rows: int) -> Float[Array, "1 rows d"]:
        width = self.config.width
        init = with_axes(nn.initializers.normal(width**-0.5), None, "embed")
        return self.param(name, init, (rows, width)).astype(self.dtype)[None]


def normalise(pixels: Pixels, config: ViTConfig) -> Float[Array, "b y x 3"]:
    """uint8 -> float32, scaled to [0, 1] and normalised with the encoder's mean and std; floats pass as they are."""
    if not jnp.issubdtype(pixels.dtype, jnp.integer):
        return pixels
    mean, std = (jnp.asarray(a, jnp.float32)[None, None, None] for a in (config.mean, config.std))
    return (pixels.astype(jnp.float32) / 255 - mean) / std


def _patches(pixels, config: ViTConfig):
    """[b y x 3] -> [b rows*columns patch*patch*3]: what a convolution with stride = kernel = patch sees."""
    (rows, columns), patch = config.grid, config.patch_size
    seen = pixels[:, : rows * patch, : columns * patch]
    tiles = seen.reshape(-1, rows, patch, columns, patch, 3).swapaxes(2, 3)
    return tiles.reshape(-1, rows * columns, patch * patch * 3)


def resample_positions(positions: Float[Array, "l d"], grid: tuple[int, int]) -> Float[Array, "l_new d"]:
    """Position embeddings of a square grid for a grid (rows, columns) of another size, in float32.

    Bicubic and antialiased: what PyTorch's `interpolate(mode="bicubic", antialias=True)` computes, and with it timm when an
    encoder reads images of another size than it was published for.
    """
    side = math.isqrt(positions.shape[0])
    if (side, side) == grid:
        return positions
    square = positions.astype(jnp.float32).reshape(side, side, -1)
    resampled = jax.image.resize(square, (*grid, square.shape[-1]), "cubic", antialias=True)
    return resampled.reshape(-1, square.shape[-1])
