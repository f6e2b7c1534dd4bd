"""Questions as token ids, and the images of several rows as arrays of one shape."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, UInt8

from ml_mamba_jax.config import MLMambaConfig
from ml_mamba_jax.errors import InputError
from ml_mamba_jax.image import prepare_images, read_image, stack_pixels
from ml_mamba_jax.prompt import Turn, render_question
from ml_mamba_jax.tokenizer import Tokenizer


def encode_turns(tokenizer: Tokenizer, turns: str | Sequence[Turn], format: str = "zephyr") -> list[int]:
    """Token ids of a question, or of a conversation that ends with one; each turn tokenised on its own, as in training.

    Raises:
        InputError: turns that do not alternate or do not end with a question, or what is neither text nor turns.
    """
    ids, _ = tokenizer.encode_pieces(render_question(turns, format))
    return ids


def encode_prompts(
    tokenizer: Tokenizer, prompts: Sequence[str | Sequence[Turn]], format: str = "zephyr"
) -> list[list[int]]:
    """`encode_turns` of each prompt. Raises InputError for what is no list of prompts, and names a prompt that is none."""
    if isinstance(prompts, str):
        raise InputError("prompts: got one string, expected a list of questions; pass [question]")
    if not isinstance(prompts, Iterable):
        raise InputError(f"prompts: got {type(prompts).__name__}, expected a list of questions or conversations")
    rows = []
    for i, turns in enumerate(prompts):
        try:
            rows.append(encode_turns(tokenizer, turns, format))
        except InputError as error:
            raise InputError(f"prompts[{i}]: {error}") from error
    return rows


def one_for_each(images, n: int) -> list:
    """The images of `n` prompts as a list; one image may stand for a list of one. Raises InputError for another number."""
    images = [None] * n if images is None else list_of_images(images)
    if not n or len(images) != n:
        raise InputError(
            f"got {n} prompts and {len(images)} images, expected as many of both, at least one; for many questions about "
            "one image pass state=image_state(...)"
        )
    return images


def list_of_images(images) -> list:
    """One image, or several, as a list. Raises InputError for what is neither."""
    if _is_image(images):
        return [images]
    if not isinstance(images, Iterable):
        raise InputError(f"images: got {type(images).__name__}, expected a list with an image or None for each prompt")
    return list(images)


def stack_images(
    images: Sequence, config: MLMambaConfig
) -> tuple[dict[str, UInt8[Array, "b y x 3"]] | None, Bool[Array, "b"] | None]:
    """Images of a batch, None for a row without -> pixels by encoder name and the mask of rows with one.

    (None, None) when no row has an image. Raises InputError for an image that cannot be read or that the model cannot
    see.
    """
    if all(image is None for image in images):
        return None, None
    if not config.vision:
        raise InputError("image: got one, but this model has no image encoders; ask without an image")
    rows = [None if image is None else prepare_images(_decoded(image), config) for image in images]
    pixels = {name: jnp.asarray(stacked) for name, stacked in stack_pixels(rows, config).items()}
    return pixels, jnp.asarray([row is not None for row in rows])


def _is_image(image) -> bool:
    from PIL import Image

    if isinstance(image, np.ndarray | Array):
        return image.ndim < 4  # a batch of pixels counts as a list of them
    return isinstance(image, str | bytes | Path | Image.Image)


def _decoded(image):
    if isinstance(image, str | Path):
        return read_image(image)
    from PIL import Image

    if isinstance(image, np.ndarray | Array):
        pixels = np.asarray(image)
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[-1] != 3:
            raise InputError(f"image: got {pixels.dtype} {pixels.shape}, expected uint8 pixels [y x 3]")
        return Image.fromarray(pixels)
    if not isinstance(image, Image.Image):
        raise InputError(f"image: got {type(image).__name__}, expected a file name, PIL.Image or uint8 pixels [y x 3]")
    return image
