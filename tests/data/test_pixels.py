"""Decoding of image files to the pixels that a viewer shows, for every orientation and color mode."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from othink_ray.data.prompts import decode_image, image_size


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


def corner_red(width: int = 40, height: int = 20) -> Image.Image:
    """Return an image that is red in the upper left quarter, else black."""
    image = Image.new("RGB", (width, height))
    image.paste((255, 0, 0), (0, 0, width // 2, height // 2))
    return image


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_applies_to_pixels_and_size(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = encoded(corner_red(), "JPEG", exif=exif, quality=95)
    upright = decode_image(image)
    assert upright.size == image_size(image) == ((40, 20) if orientation < 5 else (20, 40))
    red = np.asarray(upright)[..., 0] > 128
    corners = [bool(red[y, x]) for y in (2, -3) for x in (2, -3)]
    red_corner = {1: 0, 2: 1, 3: 3, 4: 2, 5: 0, 6: 1, 7: 3, 8: 2}
    assert [index for index, is_red in enumerate(corners) if is_red] == [red_corner[orientation]]


def test_16_bit_gray_is_scaled_to_8_bits() -> None:
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(4, axis=0)
    shades = np.asarray(decode_image(encoded(Image.fromarray(ramp))))[0, :, 0]
    assert shades[0] == 0
    assert shades[-1] >= 254
    assert np.abs(shades.astype(int) - np.arange(256)).max() <= 1


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_transparency_is_composited_on_white(mode: str) -> None:
    image = Image.new("RGBA", (8, 8), (10, 20, 30, 0))
    if mode == "PA":
        palette = Image.new("P", (8, 8), 1)
        palette.putpalette([0, 0, 0, 10, 20, 30, 40, 50, 60])
        data = encoded(palette, transparency=1)
    else:
        data = encoded(image.convert(mode))
    assert np.asarray(decode_image(data)).min() == 255


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr"])
def test_every_other_mode_is_converted_to_rgb(mode: str) -> None:
    shown = Image.new("RGB", (8, 8), "white")
    data = encoded(shown.convert(mode), "JPEG" if mode in ("CMYK", "YCbCr") else "PNG")
    result = decode_image(data)
    assert result.mode == "RGB"
    assert np.asarray(result).min() >= 250
