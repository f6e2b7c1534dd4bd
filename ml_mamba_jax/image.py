"""From an image file to the pixels an encoder sees. Pillow's bicubic filter, as the PyTorch original uses it.

`resize-naive` squeezes the picture into the encoder's square. `resize-crop` scales the shorter side and cuts out the middle.
`letterbox` first pads to a square with the encoder's mean colour.
"""

import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ml_mamba_jax.config import MLMambaConfig, ViTConfig
from ml_mamba_jax.errors import InputError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
MAX_PIXELS = 50_000_000
"""Larger images are refused before they are decoded: a small file can hold a very large one."""
MAX_PIXELS_BETWEEN = 4 * MAX_PIXELS
"""The same for what an image becomes on its way to the square: letterbox makes much of a thin line."""
JPEG_END, PNG_END = b"\xff\xd9", b"\0\0\0\0IEND\xaeB`\x82"
"""What whole files of these formats end with."""


def read_file(path: str | Path) -> bytes:
    """The bytes of an image file. Raises InputError, naming it, for one that is missing or may not be read."""
    if not Path(path).is_file():
        raise InputError(f"{path}: found no such image file")
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot read the image file: {error.strerror}") from error


def read_image(source: str | Path | bytes, name: str | None = None):
    """Decode an image file, or the bytes of one, into an upright RGB `PIL.Image`.

    `name` stands for bytes in errors.

    Raises:
        InputError: missing, damaged, of another format than `FORMATS`, or with more than `MAX_PIXELS`; names the file.
    """
    data = source if isinstance(source, bytes) else read_file(source)
    return _open(data, name or ("image" if isinstance(source, bytes) else str(source)))


def _open(data: bytes, name: str, reduced: bool = False):
    from PIL import Image, ImageOps

    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        _check_size(image, name)
        if reduced:
            image.draft("RGB", (max(image.width // 8, 1), max(image.height // 8, 1)))
        image.load()
        ImageOps.exif_transpose(image, in_place=True)  # here, so that there are never more than two of a large image
        return upright_rgb(image)
    except InputError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(f"{name}: {error} Expected at most {MAX_PIXELS} pixels; make the image smaller") from error
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and more
        reason = "not an image of a known format" if isinstance(error, Image.UnidentifiedImageError) else str(error)
        raise InputError(
            f"{name}: cannot decode the image ({reason}); expected a whole {', '.join(FORMATS)} file"
        ) from error


def _check_size(image, name: str) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise InputError(
            f"{name}: got {image.width} x {image.height} pixels, expected at most {MAX_PIXELS}; make the image smaller"
        )


def check_image(data: bytes, name: str) -> None:
    """Raise what `read_image` would for these bytes, in a third of its time: a JPEG is decoded to an eighth of its size."""
    _open(data, name, reduced=True)


def check_image_ends(source: str | Path | bytes, name: str | None = None) -> None:
    """Raise InputError for an image that is missing, of another format than `FORMATS`, too large, or cut off.

    Only its header and its end are looked at. An image whose end does not tell that it is whole is decoded.
    """
    name = name or str(source)
    try:
        with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
            format = _format(file, name)
            size = file.seek(0, io.SEEK_END)
            file.seek(max(size - len(PNG_END), 0))
            end = file.read()
            if not (format == "JPEG" and end.endswith(JPEG_END)) and not (format == "PNG" and end == PNG_END):
                file.seek(0)
                check_image(file.read(), name)
    except FileNotFoundError as error:
        raise InputError(f"{name}: found no such image file") from error
    except OSError as error:
        raise InputError(f"{name}: cannot read the image file: {error.strerror}") from error


def _format(file, name: str) -> str | None:
    """The format that the header of an image tells; None where it cannot be read, which a decoder will explain."""
    from PIL import Image

    try:
        image = Image.open(file, formats=FORMATS)
    except Exception:  # as in `_open`
        return None
    _check_size(image, name)
    return image.format


def upright_rgb(image):
    """Any `PIL.Image` as RGB, turned as its EXIF data says.

    Transparency is dropped, and what lies under it shows, as in the original. Grey values of 16 bit lose their lower byte, as
    Pillow does it for colours of 16 bit; the original clips them all to 255, which leaves little but white.
    """
    from PIL import ExifTags, Image, ImageOps

    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:  # else it would be copied
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode == "La":  # Pillow goes no other way from here
        image = image.convert("LA")
    if "transparency" in image.info:
        image = image.copy()
        del image.info["transparency"]  # Pillow would warn that RGB cannot hold it
    return image if image.mode == "RGB" else image.convert("RGB")


def prepare_images(image, config: MLMambaConfig, name: str = "image") -> dict[str, np.ndarray]:
    """A `PIL.Image` of any mode as uint8 pixels [y x 3] for each encoder by its name.

    The model normalises them on the device. Encoders that see the same pixels share one array.

    Raises:
        InputError: an image without pixels, or whose file is closed or damaged; `resize-crop` or `letterbox` of one so thin
            that it would take very much memory. Calls it `name`.
    """
    if not (image.width and image.height):
        raise InputError(f"{name}: got {image.width} x {image.height} pixels, expected at least one")
    try:
        image = upright_rgb(image)
    except Exception as error:  # what a file is only found to hold when it is looked at, as in `read_image`
        raise InputError(f"{name}: cannot decode the image ({error}); expected a whole, open one") from error
    prepared: dict[tuple, np.ndarray] = {}
    pixels = {}
    for encoder in config.vision:
        key = (
            encoder.image_size,
            None if config.resize == "resize-naive" else encoder.crop_fraction,
            encoder.mean if config.resize == "letterbox" else None,
        )
        if key not in prepared:
            prepared[key] = np.asarray(_square(image, encoder, config.resize, name))
        pixels[encoder.name] = prepared[key]
    return pixels


def stack_pixels(rows: Sequence[dict[str, np.ndarray] | None], config: MLMambaConfig) -> dict[str, np.ndarray]:
    """What `prepare_images` made of several rows as uint8 [b y x 3] by encoder; black for a row without an image."""
    stacked = {}
    for encoder in config.vision:
        blank = np.zeros((encoder.image_size, encoder.image_size, 3), np.uint8)
        stacked[encoder.name] = np.stack([blank if row is None else row[encoder.name] for row in rows])
    return stacked


def _square(image, encoder: ViTConfig, resize: str, name: str):
    from PIL import Image

    size, short = encoder.image_size, math.floor(encoder.image_size / encoder.crop_fraction)
    if resize == "resize-naive":
        return image.resize((size, size), Image.Resampling.BICUBIC)
    longer, shorter = max(image.size), min(image.size)
    between = longer**2 if resize == "letterbox" else short**2 * longer // shorter
    if between > MAX_PIXELS_BETWEEN:
        raise InputError(
            f"{name}: got {image.width} x {image.height} pixels, which {resize} would make {between}, expected at most "
            f"{MAX_PIXELS_BETWEEN}; cut the image, or choose resize-naive"
        )
    if resize == "letterbox":
        image = _letterbox(image, encoder)
    # The shorter side becomes `short`, then the middle is cut out.
    width, height = image.size
    if width <= height:
        width, height = short, int(short * height / width)
    else:
        width, height = int(short * width / height), short
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.crop((left, top, left + size, top + size))


def _letterbox(image, encoder: ViTConfig):
    """Pad with the encoder's mean colour, the same on both sides: an odd difference leaves the square one pixel short."""
    from PIL import Image

    side = max(image.size)
    left, top = (side - image.width) // 2, (side - image.height) // 2
    size = image.width + 2 * left, image.height + 2 * top
    padded = Image.new("RGB", size, tuple(int(255 * m) for m in encoder.mean))
    padded.paste(image, (left, top))
    return padded
