"""From bytes to pixels, in one place: engine and learner must see the same ones."""

from __future__ import annotations

import io

from PIL import Image, ImageOps

_ORIENTATION = 0x0112
_LYING = (5, 6, 7, 8)  # EXIF orientations that swap width and height


def decoded(image: bytes) -> Image.Image:
    """Upright, in RGB; 16 bits of gray become 8, and what is transparent is white."""
    with Image.open(io.BytesIO(image)) as opened:
        upright = ImageOps.exif_transpose(opened)
    if upright.mode.startswith("I"):
        upright = upright.point(lambda value: value / 256).convert("L")
    if upright.has_transparency_data:
        ground = Image.new("RGBA", upright.size, "white")
        upright = Image.alpha_composite(ground, upright.convert("RGBA"))
    return upright.convert("RGB")


def size_of(image: bytes) -> tuple[int, int]:
    """Width and height of the upright image, from its header alone."""
    with Image.open(io.BytesIO(image)) as opened:
        width, height = opened.size
        lying = opened.getexif().get(_ORIENTATION) in _LYING
    return (height, width) if lying else (width, height)
