"""Images: decoded upright, resized as Pillow does, refused when they cannot be used."""

import dataclasses
import io

import numpy as np
import pytest
from PIL import Image

from ml_mamba_jax.config import MLMambaConfig
from ml_mamba_jax.errors import InputError
from ml_mamba_jax.image import prepare_images, read_image

TINY = MLMambaConfig.named("tiny")


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image: Image.Image, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, **{"format": "PNG", **options})
    return stream.getvalue()


def test_a_file_and_its_bytes_are_the_same_picture(tmp_path):
    image = picture(7, 5)
    image.save(tmp_path / "a.png")
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), encoded(image)):
        np.testing.assert_array_equal(np.asarray(read_image(source)), np.asarray(image))


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1", "CMYK"])
def test_every_mode_becomes_rgb(mode):
    image = picture(6, 4).convert(mode)
    read = read_image(encoded(image, format="JPEG" if mode == "CMYK" else "PNG"))
    assert (read.mode, read.size) == ("RGB", (6, 4))


def test_exif_rotation_is_undone():
    image, exif = picture(6, 4), Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate clockwise to look at it
    read = read_image(encoded(image, exif=exif))
    np.testing.assert_array_equal(np.asarray(read), np.rot90(np.asarray(image), -1))


@pytest.mark.parametrize("size", [(32, 32), (50, 20), (20, 51), (200, 100), (1, 3)])
def test_resize_naive_is_pillows_bicubic(size):
    image = picture(*size)
    expected = np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC))
    pixels = prepare_images(image, TINY)
    assert list(pixels) == ["dinov2", "siglip"]
    for got in pixels.values():
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("size", [(64, 32), (32, 64), (99, 40), (40, 40)])
def test_resize_crop_takes_the_middle(size):
    image, (width, height) = picture(*size), size
    scale = 32 / min(size)
    resized = image.resize((int(width * scale), int(height * scale)), Image.Resampling.BICUBIC)
    left, top = round((resized.width - 32) / 2), round((resized.height - 32) / 2)
    expected = np.asarray(resized)[top : top + 32, left : left + 32]
    got = prepare_images(image, dataclasses.replace(TINY, resize="resize-crop"))["siglip"]
    np.testing.assert_array_equal(got, expected)


def test_letterbox_pads_with_the_mean_colour_of_each_encoder():
    black = Image.new("RGB", (32, 16))
    pixels = prepare_images(black, dataclasses.replace(TINY, resize="letterbox"))
    assert pixels["siglip"][0, 0].tolist() == [127, 127, 127]
    assert pixels["dinov2"][0, 0].tolist() == [int(255 * m) for m in (0.485, 0.456, 0.406)]
    for got in pixels.values():
        assert got.shape == (32, 32, 3)
        assert not got[12:20].any(), "the picture stands in the middle"


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
