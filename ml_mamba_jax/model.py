"""ML-Mamba: images and text in, logits out; a recurrent state in and out when generating."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from ml_mamba_jax.config import MLMambaConfig
from ml_mamba_jax.connector import ScanConnector
from ml_mamba_jax.layers import Remat
from ml_mamba_jax.mamba2 import Mamba2
from ml_mamba_jax.state import MambaState, init_state
from ml_mamba_jax.typing import Hidden, Images, ImageStarts, LastLogits, RowImages, RowMask, SegmentIds, Tokens
from ml_mamba_jax.vision import VisionEncoder

FLOAT32_PARAMS = {"A_log", "D", "dt_bias"}
"""Names of parameters that are float32 whatever `MLMambaConfig.param_dtype` says: decays are exponentials of them."""


class MLMamba(nn.Module):
    """Encoders -> connector -> language model; the visual tokens stand before the text (arXiv 2407.19832, figure 1).

    A hashable value without arrays. `params = model.init(key, **model.dummy_inputs())["params"]` is a plain nested
    dict, and every method is a pure function of it:

        logits = model.apply({"params": params}, tokens, images=pixels)
        logits, state = model.apply({"params": params}, tokens, images=pixels, method="prefill")
        logits, state = model.apply({"params": params}, token, state, method="step")

    Images are uint8 [b y x 3] or normalised floats by encoder name; see `ml_mamba_jax.image`. `image_mask` [b] tells
    which rows have an image: in the others the visual tokens are padding that nothing sees.
    """

    config: MLMambaConfig
    remat: Remat = False
    """Recompute each block in the backward pass instead of keeping its activations: all of it, or all but its projections."""

    def setup(self):
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        if config.vision:
            self.vision = VisionEncoder(config.vision, dtype, self.remat)
        if config.connector:
            self.connector = ScanConnector(config.connector, config.grid, dtype, self.remat)
        if config.language:
            self.language = Mamba2(config.language, dtype, self.remat)

    @nn.nowrap
    def init(self, *args, **kwargs) -> dict:
        """`nn.Module.init` without the boxes of axis names that `ml_mamba_jax.sharding.logical_axes` reads."""
        return nn.unbox(self.init_with_axes(*args, **kwargs))

    @nn.nowrap
    def init_with_axes(self, *args, **kwargs) -> dict:
        """`nn.Module.init`: parameters in boxes with their logical axis names."""
        if self.config.language is None:
            kwargs.setdefault("method", "features")
        return jax.tree_util.tree_map_with_path(self._as_kept, super().init(*args, **kwargs))

    @nn.nowrap
    def _as_kept(self, path: tuple, param: Array) -> Array:
        names = {getattr(key, "key", None) for key in path}
        return param if names & FLOAT32_PARAMS else param.astype(self.config.param_dtype)

    @nn.nowrap
    def param_shapes(self) -> dict:
        """The tree of the parameters with a `jax.ShapeDtypeStruct` in place of each array; takes no memory."""
        return jax.eval_shape(lambda: self.init(jax.random.key(0), **self.dummy_inputs()))["params"]

    @nn.nowrap
    def dummy_inputs(self, batch_size: int = 1, length: int = 2) -> dict:
        """Inputs of the right shapes, for `init`."""
        inputs = {"tokens": jnp.zeros((batch_size, length), jnp.int32)} if self.config.language else {}
        if self.config.vision:
            inputs["images"] = {
                encoder.name: jnp.zeros((batch_size, encoder.image_size, encoder.image_size, 3), jnp.uint8)
                for encoder in self.config.vision
            }
        return inputs

    def __call__(
        self,
        tokens: Tokens,
        *,
        images: Images | RowImages | None = None,
        image_mask: RowMask | None = None,
        segment_ids: SegmentIds | None = None,
        image_starts: ImageStarts | None = None,
    ) -> Float[Array, "b l_all v"]:
        """Logits of every position, [b l_image + l v]; position t predicts token t + 1. Arguments as of `hidden`."""
        hidden = self.hidden(
            tokens, images=images, image_mask=image_mask, segment_ids=segment_ids, image_starts=image_starts
        )
        return self.logits(hidden)

    def hidden(
        self,
        tokens: Tokens,
        *,
        images: Images | RowImages | None = None,
        image_mask: RowMask | None = None,
        segment_ids: SegmentIds | None = None,
        image_starts: ImageStarts | None = None,
    ) -> Float[Array, "b l_all d"]:
        """Normalised hidden states of every position; `logits` turns any of them into logits.

        Args:
            segment_ids: sequences of a row, see `pallas_kernels.segments`. An image before the text belongs to the first.
            image_starts: rows have several images, each [b m y x 3], or have them inside. The visual tokens of image i of a row
                then stand in place of its tokens from `image_starts[i]` on, and l_all is l; negative for no image.
        """
        x, segment_ids = self._sequence(tokens, images, image_mask, segment_ids, image_starts)
        return self.language(x, segment_ids=segment_ids)[0]

    def logits(self, hidden: Array) -> Array:
        """[.. d] -> float32 [.. v]."""
        return self.language.logits(hidden)

    def features(self, images: Images) -> Float[Array, "b l_image c"]:
        """Patch features of all encoders, row-major. Raises ValueError on a model without encoders."""
        if not self.config.vision:
            raise ValueError("images: got some, but this model has no image encoders; pass text only")
        return self.vision(images)

    def encode_images(self, images: Images) -> Hidden:
        """Visual tokens [b l_image d]. Raises ValueError on a model without encoders or without a connector."""
        return self.connect(self.features(images))

    def connect(self, features: Float[Array, "b l_image c"]) -> Hidden:
        """Visual tokens of patch features. Raises ValueError on a model without a connector."""
        if not self.config.connector:
            raise ValueError("features: got some, but this model has no connector; it has encoders only")
        return self.connector(features)

    def prefill(
        self,
        tokens: Tokens,
        *,
        images: Images | None = None,
        image_mask: RowMask | None = None,
        lengths: Int[Array, "b"] | None = None,
        state: MambaState | None = None,
    ) -> tuple[LastLogits, MambaState]:
        """Read a prompt, or a piece of one: logits after each row's last token, and the state there.

        Args:
            lengths: tokens of each row, which are padded on the right beyond them. Default: all.
            state: what came before; None starts afresh. A prompt read in pieces gives what it gives in one.
        """
        batch, length = tokens.shape
        segment_ids = None
        if lengths is not None:
            segment_ids = jnp.where(jnp.arange(length)[None] < lengths[:, None], 0, -1)
        if state is None:
            state = init_state(self.config.language, batch, self.config.dtype)
        x, segment_ids = self._sequence(tokens, images, image_mask, segment_ids)
        hidden, state = self.language(x, state, segment_ids)
        if lengths is None:
            last = hidden[:, -1]
        else:
            position = jnp.maximum(hidden.shape[1] - length + lengths - 1, 0)
            last = jnp.take_along_axis(hidden, position[:, None, None], axis=1)[:, 0]
        return self.logits(last), state

    def step(
        self, token: Int[Array, "b"], state: MambaState, active: RowMask | None = None
    ) -> tuple[LastLogits, MambaState]:
        """Read one token of each row: logits of the next, and the next state.

        Rows for which `active` is false keep their state, and their logits mean nothing.
        """
        segment_ids = None if active is None else jnp.where(active, 0, -1)[:, None]
        hidden, state = self.language(self.language.embed(token[:, None]), state, segment_ids)
        return self.logits(hidden[:, 0]), state

    def _sequence(self, tokens, images, image_mask, segment_ids, image_starts=None) -> tuple[Hidden, SegmentIds | None]:
        """Embeddings of [visual tokens | text] and the segment ids of both parts."""
        x = self.language.embed(tokens)
        if images is None:
            return x, segment_ids
        if image_starts is not None:
            return self._with_images_inside(x, images, image_starts), segment_ids
        visual = self.encode_images(images)
        if image_mask is not None or segment_ids is not None:
            batch, n_visual = visual.shape[:2]
            if segment_ids is None:
                segment_ids = jnp.zeros(tokens.shape, jnp.int32)
            seen = jnp.maximum(segment_ids[:, :1], 0)  # the first sequence of its row, which may be the image alone
            if image_mask is not None:
                seen = jnp.where(image_mask[:, None], seen, -1)
            segment_ids = jnp.concatenate([jnp.broadcast_to(seen, (batch, n_visual)), segment_ids], axis=1)
        return jnp.concatenate([visual.astype(x.dtype), x], axis=1), segment_ids

    def _with_images_inside(self, x: Hidden, images: RowImages, starts: ImageStarts) -> Hidden:
        """Embeddings with the visual tokens of each image in place of those from its start on."""
        batch, per_row = starts.shape
        visual = self.encode_images(jax.tree.map(lambda a: a.reshape(batch * per_row, *a.shape[2:]), images))
        n_visual = visual.shape[1]
        visual = visual.reshape(batch, per_row * n_visual, visual.shape[2]).astype(x.dtype)
        offset = jnp.arange(x.shape[1])[None, None] - starts[:, :, None]  # [b m l], from the start of each image
        inside = (starts[:, :, None] >= 0) & (offset >= 0) & (offset < n_visual)
        source = jnp.arange(per_row)[None, :, None] * n_visual + offset
        source = jnp.sum(jnp.where(inside, source, 0), axis=1)
        visual = jnp.take_along_axis(visual, source[:, :, None], axis=1)
        return jnp.where(inside.any(axis=1)[:, :, None], visual, x)
