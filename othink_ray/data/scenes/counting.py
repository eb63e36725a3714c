"""The built-in counting task: generated images with one shape in each of a few cells of a grid."""

from __future__ import annotations

import hashlib
import io

import numpy as np
from PIL import Image, ImageDraw

from othink_ray.config.schema import DataConfig
from othink_ray.data.prompts import Split, validate
from othink_ray.types import Message, Prompt

Layout = tuple[tuple[int, str, str], ...]  # (cell, shape, color) of every item, in cell order
RGB = tuple[int, int, int]

QUESTION = "How many items are there in the image?"
SEED = 250316081
CELL = 28  # pixels; one image token of Qwen2-VL
MARGIN = 2  # pixels of background between an item and the edge of its cell
RADII = range(7, 12)
SHAPES = ("circle", "square", "triangle")
COLORS: dict[str, RGB] = {
    "red": (214, 40, 40),
    "blue": (38, 84, 200),
    "green": (30, 140, 60),
    "purple": (130, 50, 160),
    "orange": (235, 130, 20),
    "black": (40, 40, 40),
}
BACKGROUND: RGB = (236, 236, 236)
TINT = 10  # maximum deviation of each color channel


class SceneCounting:
    """Counting scenes of one split; row i is a pure function of the data config, the split and i."""

    def __init__(self, data: DataConfig, split: Split) -> None:
        scenes, part = data.scenes, data.part(split)
        assert scenes is not None and part.size is not None, "config.check: generated scenes have their sizes"
        cells = scenes.image_cells**2
        if not 1 <= scenes.max_items <= cells:
            raise ValueError(
                f"data.scenes.max_items={scenes.max_items} must be from 1 to data.scenes.image_cells squared "
                f"({cells}): each item takes one cell; lower data.scenes.max_items or raise data.scenes.image_cells"
            )
        self._split: Split = split
        self._size = part.size
        self._max_items = scenes.max_items
        self._cells = scenes.image_cells
        self._question = f"{QUESTION} {data.prompt_suffix}".strip()

    def __len__(self) -> int:
        return self._size

    def prompt(self, index: int) -> Prompt:
        """Return row `index`, rendered on every call with identical bytes."""
        if not 0 <= index < self._size:
            raise IndexError(f"scenes/{self._split} has rows 0 to {self._size - 1}, not {index}")
        count = self._count(index)
        rng = _generator("scene", self._split, index)
        image = render(draw_layout(rng, count, self._cells, self._split), self._cells, rng)
        return validate(
            Prompt(
                id=f"scenes/{self._split}/{index:06d}",
                messages=(Message(role="user", text=self._question, images=1),),
                images=(png(image),),
                answer=str(count),
                task="counting",
            )
        )

    def _count(self, index: int) -> int:
        """Return the row's item count; each block of max_items rows has every count once, shuffled."""
        block, offset = divmod(index, self._max_items)
        return int(_generator("counts", self._split, block).permutation(self._max_items)[offset]) + 1


def split_of(layout: Layout) -> Split:
    """Return the split that a layout belongs to, by its hash.

    The layout can be recovered from the pixels, so no image occurs in both splits.
    """
    text = ",".join(f"{cell}:{shape}:{color}" for cell, shape, color in layout)
    return "train" if hashlib.sha256(text.encode()).digest()[0] % 2 == 0 else "test"


def draw_layout(rng: np.random.Generator, count: int, cells: int, split: Split) -> Layout:
    """Sample a layout of `count` items on a grid of cells x cells, uniformly among the split's layouts."""
    colors = tuple(COLORS)
    while True:
        taken = np.sort(rng.permutation(cells * cells)[:count])
        shapes = rng.integers(len(SHAPES), size=count)
        hues = rng.integers(len(colors), size=count)
        layout = tuple(
            (int(cell), SHAPES[shape], colors[hue]) for cell, shape, hue in zip(taken, shapes, hues, strict=True)
        )
        if split_of(layout) == split:
            return layout


def render(layout: Layout, cells: int, rng: np.random.Generator) -> Image.Image:
    """Render the layout as an RGB image, with small variations of item size, position, tint and background."""
    background = jittered(rng, BACKGROUND)
    image = Image.new("RGB", (cells * CELL, cells * CELL), background)
    draw = ImageDraw.Draw(image)
    for cell, shape, color in layout:
        radius = int(rng.integers(RADII.start, RADII.stop))
        slack = max_offset(radius)
        dx, dy = (int(shift) for shift in rng.integers(-slack, slack + 1, size=2))
        row, column = divmod(cell, cells)
        x = column * CELL + CELL // 2 + dx
        y = row * CELL + CELL // 2 + dy
        draw_item(draw, shape, x, y, radius, jittered(rng, COLORS[color]))
    return image


def max_offset(radius: int) -> int:
    """Return the maximum distance in pixels, per axis, of an item's center from the center of its cell."""
    return CELL // 2 - MARGIN - radius


def draw_item(draw: ImageDraw.ImageDraw, shape: str, x: int, y: int, radius: int, color: RGB) -> None:
    """Draw one shape inside the square of side 2 * radius + 1 centered at (x, y)."""
    box = (x - radius, y - radius, x + radius, y + radius)
    if shape == "circle":
        draw.ellipse(box, fill=color)
    elif shape == "square":
        draw.rectangle(box, fill=color)
    else:
        assert shape == "triangle"
        draw.polygon(((x, y - radius), (x - radius, y + radius), (x + radius, y + radius)), fill=color)


def _generator(use: str, split: Split, index: int) -> np.random.Generator:
    key = (SEED, ("counts", "scene").index(use), ("train", "test").index(split), index)
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))


def jittered(rng: np.random.Generator, color: RGB) -> RGB:
    """Return the color with each channel shifted by at most TINT."""
    red, green, blue = (int(shift) for shift in rng.integers(-TINT, TINT + 1, size=3))
    return color[0] + red, color[1] + green, color[2] + blue


def png(image: Image.Image) -> bytes:
    """Encode as PNG without metadata, so that equal pixels give equal bytes.

    Low compression halves the time to write an image here and to read it in engine and learner; the files are small.
    """
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()
