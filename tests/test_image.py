"""Images: decoded upright as RGB, resized as Pillow and torchvision do, refused when they cannot be used.

What is expected is restated here from the description of the original's pipeline, on real photos in many shapes.
"""

import dataclasses
import io
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageOps

from ml_mamba_jax.config import MLMambaConfig
from ml_mamba_jax.errors import InputError
from ml_mamba_jax.image import prepare_images, read_image
from ml_mamba_jax.vit import normalise
from tests import real_data

TINY = MLMambaConfig.named("tiny")
BIG = MLMambaConfig.named("ml-mamba-3b")
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
CLIP = dataclasses.replace(
    TINY,
    vision=(
        dataclasses.replace(
            TINY.vision[0], name="clip", image_size=224, patch_size=16, crop_fraction=0.9, mean=CLIP_MEAN, std=CLIP_STD
        ),
    ),
)
"""The one encoder whose shorter side is first scaled to more than the square, 248."""
RESIZES = ["resize-naive", "resize-crop", "letterbox"]
SIZES = [
    (640, 201),
    (200, 427),
    (384, 384),
    (385, 384),
    (384, 387),
    (300, 301),
    (224, 249),
    (33, 32),
    (3, 2),
    (1, 7),
    (1, 1),
]


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def photo(width: int, height: int) -> Image.Image:
    """A part of a real photo."""
    return Image.open(real_data.CHINA).crop((0, 0, width, height))


def encoded(image: Image.Image, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, **{"format": "PNG", **options})
    return stream.getvalue()


def expected_pixels(image: Image.Image, size: int, resize: str, mean, resize_to: int) -> np.ndarray:
    """torchvision's transforms of a PIL image: Resize((size, size)), or Resize(resize_to) and CenterCrop(size)."""
    if resize == "resize-naive":
        return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))
    if resize == "letterbox":
        longest = max(image.size)
        x, y = int((longest - image.width) / 2), int((longest - image.height) / 2)
        image = ImageOps.expand(image, (x, y, x, y), tuple(int(m * 255) for m in mean))
    short, long = sorted(image.size)
    longer = int(resize_to * long / short)
    to = (resize_to, longer) if image.width <= image.height else (longer, resize_to)
    resized = np.asarray(image.resize(to, Image.Resampling.BICUBIC))
    top, left = int(np.rint((resized.shape[0] - size) / 2)), int(np.rint((resized.shape[1] - size) / 2))
    return resized[top : top + size, left : left + size]


def assert_prepared(image: Image.Image, config: MLMambaConfig, resize_to: int) -> None:
    """The pixels of every encoder bit by bit, and what the model makes of them, for each strategy."""
    for resize in RESIZES:
        prepared = prepare_images(image, dataclasses.replace(config, resize=resize))
        assert list(prepared) == [encoder.name for encoder in config.vision]
        for encoder in config.vision:
            got, size = prepared[encoder.name], encoder.image_size
            assert got.dtype == np.uint8 and got.shape == (size, size, 3)
            expected = expected_pixels(image, size, resize, encoder.mean, resize_to)
            np.testing.assert_array_equal(got, expected, err_msg=f"{image.size} {resize} {encoder.name}")
            scaled = (expected / 255 - np.array(encoder.mean)) / np.array(encoder.std)
            normalised = jax.jit(normalise, static_argnums=1)(jnp.asarray(got)[None], encoder)
            assert normalised.dtype == jnp.float32
            np.testing.assert_allclose(normalised[0], scaled, rtol=0, atol=1e-6)


@pytest.mark.parametrize("path", real_data.IMAGES)
def test_real_images_become_what_torchvision_makes_of_them(path):
    image = read_image(path)
    np.testing.assert_array_equal(np.asarray(image), np.asarray(Image.open(path).convert("RGB")))
    assert_prepared(image, BIG, 384)


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_every_shape_becomes_what_torchvision_makes_of_it(size):
    assert_prepared(photo(*size), BIG, 384)
    assert_prepared(photo(*size), CLIP, 248)
    assert_prepared(photo(*size), TINY, 32)


@pytest.mark.parametrize("extra, first", [(1, 0), (2, 1), (3, 2), (5, 2)])
def test_half_a_pixel_is_rounded_to_the_even_one(extra, first):
    """A picture whose shorter side fits is only cut."""
    image = photo(384 + extra, 384)
    got = prepare_images(image, dataclasses.replace(BIG, resize="resize-crop"))["siglip"]
    np.testing.assert_array_equal(got, np.asarray(image)[:, first : first + 384])


def test_letterbox_pads_with_the_mean_colour_of_each_encoder():
    black = Image.new("RGB", (32, 16))
    pixels = prepare_images(black, dataclasses.replace(TINY, resize="letterbox"))
    assert pixels["siglip"][0, 0].tolist() == [127, 127, 127]
    assert pixels["dinov2"][0, 0].tolist() == [123, 116, 103]
    for got in pixels.values():
        assert not got[8:24].any() and got[:8].all() and got[24:].all(), "the picture stands in the middle"


def test_an_odd_letterbox_leaves_no_margin_on_one_side():
    """31 x 32 is padded by int(0.5) = 0 on both sides, stretched to 32 x 33 and cut."""
    image = photo(31, 32)
    got = prepare_images(image, dataclasses.replace(TINY, resize="letterbox"))["siglip"]
    stretched = image.resize((32, 33), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(got, np.asarray(stretched)[:32])


def test_encoders_that_see_the_same_pixels_share_them():
    def shared(resize, **changes) -> bool:
        first, second = BIG.vision
        vision = (first, dataclasses.replace(second, **changes))
        pixels = prepare_images(photo(99, 70), dataclasses.replace(BIG, vision=vision, resize=resize))
        return pixels["dinov2"] is pixels["siglip"]

    assert shared("resize-naive", crop_fraction=0.9) and shared("resize-crop")
    assert not shared("resize-crop", crop_fraction=0.9) and not shared("letterbox")
    assert not shared("resize-naive", image_size=378)


def test_a_thin_line_is_not_made_a_huge_square():
    line = Image.new("RGB", (1, 20_000))
    for resize, pixels in (("letterbox", 400_000_000), ("resize-crop", 384**2 * 20_000)):
        with pytest.raises(InputError, match=f"r7: got 1 x 20000 pixels, which {resize} would make {pixels}, expected"):
            prepare_images(line, dataclasses.replace(BIG, resize=resize), "r7")
    assert prepare_images(line, BIG)["siglip"].shape == (384, 384, 3)


def test_a_file_and_its_bytes_are_the_same_picture(tmp_path):
    image = photo(7, 5)
    image.save(tmp_path / "a.png")
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), encoded(image)):
        np.testing.assert_array_equal(np.asarray(read_image(source)), np.asarray(image))


def stacked(grey: np.ndarray) -> np.ndarray:
    return np.stack([grey] * 3, axis=-1)


def coloured(image: Image.Image) -> np.ndarray:
    """What the palette says."""
    return np.asarray(image.getpalette(), np.uint8).reshape(-1, 3)[np.asarray(image)]


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1", "CMYK"])
def test_every_mode_becomes_rgb(mode):
    """Transparency is dropped: the colours under it show."""
    alpha = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).resize((60, 40))
    image = photo(60, 40)
    if mode in ("LA", "RGBA"):
        image = image.convert(mode.removesuffix("A"))
        image.putalpha(alpha)
    elif mode == "1":
        image = image.convert("1")
    elif mode == "P":
        image = image.quantize(200)
    else:
        image = image.convert(mode)
    assert image.mode == mode
    data = encoded(image, format="JPEG" if mode == "CMYK" else "PNG")
    array = np.asarray(Image.open(io.BytesIO(data)))
    expected = {
        "L": lambda: stacked(array),
        "LA": lambda: stacked(array[..., 0]),
        "P": lambda: coloured(image),
        "RGBA": lambda: array[..., :3],
        "1": lambda: stacked(array * np.uint8(255)),
        "CMYK": lambda: np.rint((255 - array[..., :3].astype(float)) * (255 - array[..., 3:].astype(float)) / 255),
    }[mode]()
    read = read_image(data)
    assert (read.mode, read.size) == ("RGB", (60, 40))
    np.testing.assert_allclose(np.asarray(read).astype(int), expected, rtol=0, atol=1 if mode == "CMYK" else 0)
    assert len(np.unique(np.asarray(read))) > 1


@pytest.mark.parametrize(
    "format, transparency",
    [("GIF", 3), ("PNG", 3), ("PNG", bytes(range(0, 200, 2)))],
    ids=["GIF", "PNG", "PNG with a table"],
)
def test_a_palette_with_transparency_keeps_its_colours(format, transparency):
    image = photo(60, 40).quantize(200)
    read = read_image(encoded(image, format=format, transparency=transparency))
    np.testing.assert_array_equal(np.asarray(read), coloured(image))


def test_grey_of_sixteen_bits_keeps_its_picture():
    """Pillow's own conversion makes everything from 255 on white."""
    grey = np.asarray(photo(60, 40).convert("L"), np.uint16) * 256 + 200
    data = encoded(Image.fromarray(grey))
    assert Image.open(io.BytesIO(data)).mode == "I;16"
    np.testing.assert_array_equal(np.asarray(read_image(data)), stacked(grey // 256))
    assert (np.asarray(read_image(encoded(Image.fromarray(np.full((4, 4), 40_000, np.uint16))))) == 156).all()


@pytest.mark.parametrize(
    "orientation, upright",
    [
        (1, lambda a: a),
        (2, lambda a: a[:, ::-1]),
        (3, lambda a: a[::-1, ::-1]),
        (4, lambda a: a[::-1]),
        (5, lambda a: a.swapaxes(0, 1)),
        (6, lambda a: np.rot90(a, -1)),  # the camera was turned to the left: turn the picture to the right
        (7, lambda a: a[::-1, ::-1].swapaxes(0, 1)),
        (8, lambda a: np.rot90(a)),
    ],
)
@pytest.mark.parametrize("mode", ["RGB", "I;16", "JPEG"])
def test_every_exif_orientation_is_undone(orientation, upright, mode):
    image, exif = photo(60, 40), Image.Exif()
    exif[0x0112] = orientation
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L"), np.uint16) * 257)
    format = "JPEG" if mode == "JPEG" else "PNG"
    got = read_image(encoded(image, format=format, exif=exif))
    expected = upright(np.asarray(read_image(encoded(image, format=format))))
    np.testing.assert_array_equal(np.asarray(got), expected)


def test_unusable_files_are_named(tmp_path):
    whole = encoded(picture(40, 30))
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "page.png").write_text("<html>not found</html>")
    (tmp_path / "empty.jpg").touch()
    for name in ("cut.png", "page.png", "empty.jpg"):
        with pytest.raises(InputError, match=f"{name}: cannot decode"):
            read_image(tmp_path / name)
    with pytest.raises(InputError, match=r"gone.png: found no such image file"):
        read_image(tmp_path / "gone.png")
    with pytest.raises(InputError, match="found no such image file"):
        read_image(tmp_path)
    with pytest.raises(InputError, match="record 7: cannot decode"):
        read_image(b"nothing", "record 7")


def test_a_small_file_with_many_pixels_is_refused_before_it_is_decoded():
    bomb = encoded(Image.new("1", (8000, 8000)))
    assert len(bomb) < 20_000
    with pytest.raises(InputError, match="8000 x 8000 pixels"):
        read_image(bomb)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1", "CMYK"])
def test_an_image_of_any_mode_is_prepared_as_rgb(mode):
    image = picture(40, 30).convert(mode)
    for got in prepare_images(image, TINY).values():
        np.testing.assert_array_equal(got, prepare_images(image.convert("RGB"), TINY)["siglip"])


MEMORY = """
import re, sys
from ml_mamba_jax.image import read_image

def most_memory():
    return int(re.search("VmHWM: *\\t *([0-9]+) kB", open("/proc/self/status").read())[1])

small, large = (open(path, "rb").read() for path in sys.argv[1:])
read_image(small)
before = most_memory()
read_image(large)
print(most_memory() - before)
"""


def test_a_large_image_takes_no_more_than_two_of_it(tmp_path):
    """With transparency and turned, which each would be another copy: 400 MB for the largest that is read."""
    width, height = 5000, 4000
    large = Image.new("RGBA", (width, height))
    exif = large.getexif()
    exif[0x112] = 6
    large.save(tmp_path / "large.png", exif=exif)
    large.resize((8, 8)).save(tmp_path / "small.png", exif=exif)
    command = [sys.executable, "-c", MEMORY, tmp_path / "small.png", tmp_path / "large.png"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 2.2 * 4 * width * height / 1024
