"""From an image file to the pixels an encoder sees. Pillow's bicubic filter, as the PyTorch original uses it."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ml_mamba_jax.config import MLMambaConfig, ViTConfig
from ml_mamba_jax.errors import InputError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
MAX_PIXELS = 50_000_000
"""Larger images are refused before they are decoded: a small file can hold a very large one."""


def read_image(source: str | Path | bytes, name: str | None = None):
    """Decode an image file, or the bytes of one, into an upright RGB `PIL.Image`.

    `name` stands for bytes in errors.

    Raises:
        InputError: missing, damaged, of another format than `FORMATS`, or with more than `MAX_PIXELS`; names the file.
    """
    from PIL import Image, ImageOps

    name = name or ("image" if isinstance(source, bytes) else str(source))
    if not isinstance(source, bytes) and not Path(source).is_file():
        raise InputError(f"{name}: found no such image file")
    try:
        data = source if isinstance(source, bytes) else Path(source).read_bytes()
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise InputError(
                f"{name}: got {image.width} x {image.height} pixels, expected at most {MAX_PIXELS}; make the image smaller"
            )
        image.load()
        return ImageOps.exif_transpose(image).convert("RGB")
    except InputError:
        raise
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and more
        reason = "not an image of a known format" if isinstance(error, Image.UnidentifiedImageError) else str(error)
        raise InputError(
            f"{name}: cannot decode the image ({reason}); expected a whole {', '.join(FORMATS)} file"
        ) from error


def prepare_images(image, config: MLMambaConfig) -> dict[str, np.ndarray]:
    """A `PIL.Image` as uint8 pixels [y x 3] for each encoder by its name.

    The model normalises them on the device. Encoders that see the same pixels share one array.
    """
    prepared: dict[tuple, np.ndarray] = {}
    pixels = {}
    for encoder in config.vision:
        key = (encoder.image_size, encoder.mean if config.resize == "letterbox" else None)
        if key not in prepared:
            prepared[key] = np.asarray(_square(image, encoder, config.resize))
        pixels[encoder.name] = prepared[key]
    return pixels


def stack_pixels(rows: Sequence[dict[str, np.ndarray] | None], config: MLMambaConfig) -> dict[str, np.ndarray]:
    """What `prepare_images` made of several rows as uint8 [b y x 3] by encoder; black for a row without an image."""
    stacked = {}
    for encoder in config.vision:
        blank = np.zeros((encoder.image_size, encoder.image_size, 3), np.uint8)
        stacked[encoder.name] = np.stack([blank if row is None else row[encoder.name] for row in rows])
    return stacked


def _square(image, encoder: ViTConfig, resize: str):
    from PIL import Image

    size = encoder.image_size
    if resize == "letterbox":
        image = _letterbox(image, encoder)
    if resize == "resize-naive":
        return image.resize((size, size), Image.Resampling.BICUBIC)
    # The shorter side becomes `size`, the longer is cut in the middle.
    width, height = image.size
    if width <= height:
        width, height = size, int(size * height / width)
    else:
        width, height = int(size * width / height), size
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.crop((left, top, left + size, top + size))


def _letterbox(image, encoder: ViTConfig):
    """Pad to a square with the encoder's mean colour, the same on both sides."""
    from PIL import Image

    side = max(image.size)
    left, top = (side - image.width) // 2, (side - image.height) // 2
    padded = Image.new(
        "RGB", (image.width + 2 * left, image.height + 2 * top), tuple(int(255 * m) for m in encoder.mean)
    )
    padded.paste(image, (left, top))
    return padded
