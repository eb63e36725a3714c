"""Image reading and decoding, shared by the engine and the learner so that both see identical pixels."""

from __future__ import annotations

import io
import os
import stat
from pathlib import Path

from PIL import Image, ImageOps

MAX_FILE_BYTES = 256 * 2**20  # an uncompressed image of 50 million RGB pixels is 150 MB
_ORIENTATION = 0x0112
_TRANSPOSED = (5, 6, 7, 8)  # EXIF orientations that swap width and height


def decoded(image: bytes) -> Image.Image:
    """Decode to upright RGB: 16-bit gray is scaled to 8 bits, transparency is composited on white."""
    with Image.open(io.BytesIO(image)) as opened:
        upright = ImageOps.exif_transpose(opened)
    if upright.mode.startswith("I"):
        upright = upright.point(lambda value: value / 256).convert("L")
    if upright.has_transparency_data:
        background = Image.new("RGBA", upright.size, "white")
        upright = Image.alpha_composite(background, upright.convert("RGBA"))
    return upright.convert("RGB")


def size_of(image: bytes) -> tuple[int, int]:
    """Return (width, height) of the upright image, reading only its header."""
    with Image.open(io.BytesIO(image)) as opened:
        width, height = opened.size
        transposed = opened.getexif().get(_ORIENTATION) in _TRANSPOSED
    return (height, width) if transposed else (width, height)


class UnreadableImage(ValueError):
    """An image file that cannot be read, with the reason and the remedy."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(reason)
        self.remedy = remedy


class ImageFiles:
    """Reads regular files below a root folder, symlinks resolved; other files only if `outside` is true."""

    def __init__(self, root: Path, *, outside: bool) -> None:
        self._root, self._real_root, self._outside = root, root.resolve(), outside

    def read(self, name: str) -> bytes:
        """Return the file's bytes, without blocking on devices or pipes."""
        path = self._root / name
        try:
            if not (self._outside or path.resolve().is_relative_to(self._real_root)):
                raise UnreadableImage(
                    f"image file {path} is outside {self._root}",
                    "move it there, set image_root, or data.images_outside_root=true if you trust these paths",
                )
            with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
                status = os.fstat(file.fileno())
                if not stat.S_ISREG(status.st_mode):
                    raise UnreadableImage(f"image file {path} is not a regular file", "give the path of an image file")
                data = file.read(MAX_FILE_BYTES + 1)
        except (OSError, ValueError) as error:
            if isinstance(error, UnreadableImage):
                raise
            raise UnreadableImage(
                f"image file {path} cannot be read: {error.__class__.__name__}",
                "check that it exists, or set image_root: image paths are relative to it",
            ) from error
        if len(data) > MAX_FILE_BYTES:
            raise UnreadableImage(
                f"image file {path} is larger than {MAX_FILE_BYTES >> 20} MiB", "use a smaller image file"
            )
        return data
