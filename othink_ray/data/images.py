"""From bytes to pixels, in one place: engine and learner must see the same ones."""

from __future__ import annotations

import io
import os
import stat
from pathlib import Path

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


MOST_BYTES = 256 * 2**20  # of a file; one image of 50 million pixels is 150 MB before any compression


class UnreadableImage(ValueError):
    """Why a file is not read, and what to do."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(reason)
        self.remedy = remedy


class ImageFiles:
    """Regular files below a folder, links followed; files elsewhere only if `outside` allows it."""

    def __init__(self, root: Path, *, outside: bool) -> None:
        self._root, self._real_root, self._outside = root, root.resolve(), outside

    def read(self, name: str) -> bytes:
        """The file's bytes; neither a device nor a pipe is waited for."""
        path = self._root / name
        try:
            if not (self._outside or path.resolve().is_relative_to(self._real_root)):
                raise UnreadableImage(
                    f"image file {path} is outside {self._root}",
                    "move it there, set image_root, or data.images_outside_root=true if you trust these paths",
                )
            with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
                found = os.fstat(file.fileno())
                if not stat.S_ISREG(found.st_mode):
                    raise UnreadableImage(f"image file {path} is not a regular file", "give the path of an image")
                data = file.read(MOST_BYTES + 1)
        except (OSError, ValueError) as error:
            if isinstance(error, UnreadableImage):
                raise
            raise UnreadableImage(
                f"image file {path} cannot be read: {error.__class__.__name__}",
                "put it there, or set image_root: image paths start from it",
            ) from error
        if len(data) > MOST_BYTES:
            raise UnreadableImage(f"image file {path} has more than {MOST_BYTES >> 20} MiB", "make it smaller")
        return data
