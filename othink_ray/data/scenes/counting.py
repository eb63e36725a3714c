"""The embedded counting task: generated images with one shape in each of a few cells of a grid."""

from __future__ import annotations

import hashlib
import io

import numpy as np
from PIL import Image, ImageDraw

from othink_ray.config.schema import DataConfig
from othink_ray.data.prompts import Split, validate
from othink_ray.types import Message, Prompt

Layout = tuple[tuple[int, str, str], ...]  # (cell, shape, colour) of every item, in cell order
RGB = tuple[int, int, int]

QUESTION = "How many items are there in the image?"
SEED = 250316081
CELL = 28  # pixels; one image token of Qwen2-VL
MARGIN = 2  # pixels of background that an item leaves at the edge of its cell
RADII = range(7, 12)
SHAPES = ("circle", "square", "triangle")
COLOURS: dict[str, RGB] = {
    "red": (214, 40, 40),
    "blue": (38, 84, 200),
    "green": (30, 140, 60),
    "purple": (130, 50, 160),
    "orange": (235, 130, 20),
    "black": (40, 40, 40),
}
BACKGROUND: RGB = (236, 236, 236)
TINT = 10  # each channel of a colour varies by at most this much


class SceneCounting:
    """Counting scenes of one split; row i depends on the data config, the split and i, and on nothing else."""

    def __init__(self, data: DataConfig, split: Split) -> None:
        scenes, part = data.scenes, data.part(split)
        assert scenes is not None and part.size is not None, "config.check: generated scenes have their numbers"
        cells = scenes.image_cells**2
        if not 1 <= scenes.max_items <= cells:
            raise ValueError(
                f"data.scenes.max_items={scenes.max_items} must be from 1 to data.scenes.image_cells squared "
                f"({cells}): one item stands in one cell; lower data.scenes.max_items or raise data.scenes.image_cells"
            )
        self._split: Split = split
        self._size = part.size
        self._max_items = scenes.max_items
        self._cells = scenes.image_cells
        self._question = f"{QUESTION} {data.prompt_suffix}".strip()

    def __len__(self) -> int:
        return self._size

    def prompt(self, index: int) -> Prompt:
        """Row `index`, drawn anew with the same bytes on every call."""
        if not 0 <= index < self._size:
            raise IndexError(f"scenes/{self._split} has rows 0 to {self._size - 1}, not {index}")
        count = self._count(index)
        rng = _stream("scene", self._split, index)
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
        """Every block of max_items rows holds each count once, in a shuffled order."""
        block, place = divmod(index, self._max_items)
        return int(_stream("counts", self._split, block).permutation(self._max_items)[place]) + 1


def split_of(layout: Layout) -> Split:
    """The only split that may show this layout; the layout can be read off the pixels, so no image is in both."""
    text = ",".join(f"{cell}:{shape}:{colour}" for cell, shape, colour in layout)
    return "train" if hashlib.sha256(text.encode()).digest()[0] % 2 == 0 else "test"


def draw_layout(rng: np.random.Generator, count: int, cells: int, split: Split) -> Layout:
    """A layout of `count` items on cells x cells, uniform over those that belong to the split."""
    colours = tuple(COLOURS)
    while True:
        taken = np.sort(rng.permutation(cells * cells)[:count])
        shapes = rng.integers(len(SHAPES), size=count)
        tones = rng.integers(len(colours), size=count)
        layout = tuple(
            (int(cell), SHAPES[shape], colours[tone]) for cell, shape, tone in zip(taken, shapes, tones, strict=True)
        )
        if split_of(layout) == split:
            return layout


def render(layout: Layout, cells: int, rng: np.random.Generator) -> Image.Image:
    """The layout as an RGB image; size, place in the cell, tint and background vary a little."""
    background = near(rng, BACKGROUND)
    image = Image.new("RGB", (cells * CELL, cells * CELL), background)
    draw = ImageDraw.Draw(image)
    for cell, shape, colour in layout:
        radius = int(rng.integers(RADII.start, RADII.stop))
        room = play(radius)
        across, down = (int(shift) for shift in rng.integers(-room, room + 1, size=2))
        row, column = divmod(cell, cells)
        x = column * CELL + CELL // 2 + across
        y = row * CELL + CELL // 2 + down
        draw_item(draw, shape, x, y, radius, near(rng, COLOURS[colour]))
    return image


def play(radius: int) -> int:
    """How many pixels the centre of an item may leave the centre of its cell."""
    return CELL // 2 - MARGIN - radius


def draw_item(draw: ImageDraw.ImageDraw, shape: str, x: int, y: int, radius: int, colour: RGB) -> None:
    """One shape inside the square of side 2 * radius + 1 round (x, y)."""
    box = (x - radius, y - radius, x + radius, y + radius)
    if shape == "circle":
        draw.ellipse(box, fill=colour)
    elif shape == "square":
        draw.rectangle(box, fill=colour)
    else:
        assert shape == "triangle"
        draw.polygon(((x, y - radius), (x - radius, y + radius), (x + radius, y + radius)), fill=colour)


def _stream(use: str, split: Split, index: int) -> np.random.Generator:
    key = (SEED, ("counts", "scene").index(use), ("train", "test").index(split), index)
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))


def near(rng: np.random.Generator, colour: RGB) -> RGB:
    """The colour, a little off."""
    red, green, blue = (int(shift) for shift in rng.integers(-TINT, TINT + 1, size=3))
    return colour[0] + red, colour[1] + green, colour[2] + blue


def png(image: Image.Image) -> bytes:
    """The image as PNG, without metadata: the same pixels give the same bytes.

    Hardly compressed: these are drawn, and read by engine and learner, in half the time, and are small anyway.
    """
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()
