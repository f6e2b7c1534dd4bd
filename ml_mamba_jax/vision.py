"""Several image encoders side by side: their patch features, concatenated along channels."""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from ml_mamba_jax.config import ViTConfig
from ml_mamba_jax.layers import Remat
from ml_mamba_jax.typing import Images
from ml_mamba_jax.vit import ViT


class VisionEncoder(nn.Module):
    """Images -> [b l c] with the channels of all encoders, in the order of the config (arXiv 2407.19832, eq. 5)."""

    encoders: tuple[ViTConfig, ...]
    dtype: jnp.dtype
    remat: Remat = False

    @nn.compact
    def __call__(self, images: Images) -> Float[Array, "b l c"]:
        features = [
            ViT(encoder, self.dtype, self.remat, name=encoder.name)(pixels_for(images, encoder))
            for encoder in self.encoders
        ]
        return jnp.concatenate(features, axis=-1)


def pixels_for(images: Images, encoder: ViTConfig):
    """The picture meant for `encoder`. Raises ValueError where there is none, or floats that name no encoder."""
    if isinstance(images, dict):
        if encoder.name not in images:
            raise ValueError(f"images: got pictures for {sorted(images)}, expected one for {encoder.name!r}")
        return images[encoder.name]
    if not jnp.issubdtype(images.dtype, jnp.integer):
        raise ValueError(
            f"images: got one {images.dtype} array for all encoders, expected uint8 pixels, "
            "or a dict of normalised arrays by encoder name (each has its own mean and std)"
        )
    return images
