"""The built-in geometry task: figures drawn to scale, with the given values written in separate cells."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from othink_ray.config.schema import DataConfig
from othink_ray.data.prompts import Split, validate
from othink_ray.data.scenes.counting import BACKGROUND, CELL, RGB, jittered, png
from othink_ray.data.scenes.counting import COLORS as SCENE_COLORS
from othink_ray.types import Message, Prompt

SEED = 250316082
COLUMNS, ROWS = 4, 3  # cells of an image, one image token each
WIDTH, HEIGHT = COLUMNS * CELL, ROWS * CELL
SHIFT = 1  # maximum distance in pixels of a label from the center of its cell
INK: RGB = (16, 16, 16)
COLORS = {name: color for name, color in SCENE_COLORS.items() if name != "black"}  # black is too close to INK
DOT = 3  # pixels; a glyph is 3 dots wide and 5 high, so that two fit in a cell
UNIT = "#"  # drawn as a square that fills its cell, not as text
GLYPHS = {
    "0": "111101101101111",
    "1": "010110010010111",
    "2": "111001111100111",
    "3": "111001111001111",
    "4": "101101111001001",
    "5": "111100111001111",
    "6": "111100111101111",
    "7": "111001001010010",
    "8": "111101111101111",
    "9": "111101111001111",
    "?": "111001011000010",
}

Point = tuple[float, float]
Lines = tuple[tuple[Point, Point], ...]
Labels = tuple[tuple[int, str], ...]  # (cell, text), in cell order
# Angle figures fill the two upper rows of cells, down to FLOOR; their angles are written below it.
LEFT, RIGHT, TOP, FLOOR = 4, WIDTH - 5, 4, 2 * CELL
LOWER_LEFT, LOWER_RIGHT = 8, 11  # cells of the written angles
ANGLES = (30, 40, 60, 80, 90)


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One problem: question, lines (pairs of points in pixels), labels by cell, reasoning text and answer."""

    question: str
    lines: Lines
    labels: Labels
    thought: str
    answer: str


class GeometryScenes:
    """Geometry problems of one split; row i is a pure function of the data config, the split and i."""

    def __init__(self, data: DataConfig, split: Split) -> None:
        part = data.part(split)
        assert part.size is not None, "config.check: generated questions have a size"
        self._split: Split = split
        self._size = part.size
        self._suffix = data.prompt_suffix

    def __len__(self) -> int:
        return self._size

    def prompt(self, index: int) -> Prompt:
        """Return row `index`, rendered on every call with identical bytes."""
        if not 0 <= index < self._size:
            raise IndexError(f"geometry_scenes/{self._split} has rows 0 to {self._size - 1}, not {index}")
        rng = _generator("scene", self._split, index)
        figure, color = draw_problem(rng, self._kind(index), self._split)
        return validate(
            Prompt(
                id=f"geometry_scenes/{self._split}/{index:06d}",
                messages=(Message(role="user", text=f"{figure.question} {self._suffix}".strip(), images=1),),
                images=(png(render(figure, color, rng)),),
                answer=figure.answer,
                task="geometry",
                thought=figure.thought,
            )
        )

    def _kind(self, index: int) -> str:
        """Return the row's problem kind; each block of rows has every kind once, shuffled."""
        block, offset = divmod(index, len(PROBLEMS))
        order = _generator("kinds", self._split, block).permutation(len(PROBLEMS))
        return tuple(PROBLEMS)[int(order[offset])]


def split_of(labels: Labels, color: str) -> Split:
    """Return the split of a figure, by a hash of what its pixels show: no image is in both splits."""
    text = ",".join([color, *(f"{cell}:{label}" for cell, label in labels)])
    return "train" if hashlib.sha256(text.encode()).digest()[0] % 2 == 0 else "test"


def draw_problem(rng: np.random.Generator, kind: str, split: Split) -> tuple[Figure, str]:
    """Sample a figure of this kind and its color, uniformly among the split's figures."""
    while True:
        figure = PROBLEMS[kind](rng)
        color = tuple(COLORS)[rng.integers(len(COLORS))]
        if split_of(figure.labels, color) == split:
            return figure, color


def render(figure: Figure, color: str, rng: np.random.Generator) -> Image.Image:
    """Render the figure as an RGB image, with small variations of tint, background and label positions."""
    background = jittered(rng, BACKGROUND)
    image = Image.new("RGB", (WIDTH, HEIGHT), background)
    draw = ImageDraw.Draw(image)
    tint = jittered(rng, COLORS[color])
    for (x0, y0), (x1, y1) in figure.lines:
        draw.line((round(x0), round(y0), round(x1), round(y1)), fill=tint, width=2)
    for cell, text in figure.labels:
        dx, dy = (int(shift) for shift in rng.integers(-SHIFT, SHIFT + 1, size=2))
        row, column = divmod(cell, COLUMNS)
        if text == UNIT:
            corner = (column * CELL, row * CELL)
            draw.rectangle((corner[0] + 1, corner[1] + 1, corner[0] + CELL - 2, corner[1] + CELL - 2), fill=tint)
            continue
        draw_label(draw, text, column * CELL + CELL // 2 + dx, row * CELL + CELL // 2 + dy, background)
    return image


def draw_label(draw: ImageDraw.ImageDraw, text: str, x: int, y: int, background: RGB) -> None:
    """Draw a label centered at (x, y), on a plate of background color that hides the lines under it."""
    width, height = (4 * len(text) - 1) * DOT, 5 * DOT
    left, top = x - width // 2, y - height // 2
    draw.rectangle((left - 1, top - 1, left + width, top + height), fill=background)
    for index, character in enumerate(text):
        for dot, ink in enumerate(GLYPHS[character]):
            if ink == "1":
                x0, y0 = left + (4 * index + dot % 3) * DOT, top + dot // 3 * DOT
                draw.rectangle((x0, y0, x0 + DOT - 1, y0 + DOT - 1), fill=INK)


# ---- the problems


def _straight_line(rng: np.random.Generator) -> Figure:
    """Ask for the supplement of a given angle on a straight line."""
    given = int(rng.choice(ANGLES))
    mirrored = bool(rng.integers(2))
    turn = math.radians(180 - given if mirrored else given)
    foot = (WIDTH / 2, float(FLOOR))
    ray = (foot[0] + 46 * math.cos(turn), foot[1] - 46 * math.sin(turn))
    known, unknown = (LOWER_LEFT, LOWER_RIGHT) if mirrored else (LOWER_RIGHT, LOWER_LEFT)
    return Figure(
        question=f"Two angles lie on a straight line, and one is {given}°. How large is the other?",
        lines=(((LEFT, FLOOR), (RIGHT, FLOOR)), (foot, ray)),
        labels=_labels((known, str(given)), (unknown, "?")),
        thought=f"180-{given}={180 - given}",
        answer=f"{180 - given}°",
    )


def _third_angle(rng: np.random.Generator) -> Figure:
    """Ask for the third angle of a triangle, given two."""
    left, right, third = _angles(rng)
    return Figure(
        question=f"Two angles of the triangle are {left}° and {right}°. How large is the third?",
        lines=_triangle(left, right),
        labels=_labels((LOWER_LEFT, str(left)), (LOWER_RIGHT, str(right))),
        thought=f"180-{left}-{right}={third}",
        answer=f"{third}°",
    )


def _type_of_triangle(rng: np.random.Generator) -> Figure:
    """Ask for the type of a triangle; acute, right and obtuse are equally frequent."""
    target = "ABC"[rng.integers(3)]
    while True:
        left, right, third = _angles(rng)
        largest = max(left, right, third)
        if target == ("A" if largest < 90 else "B" if largest == 90 else "C"):
            break
    return Figure(
        question=f"Two angles of the triangle are {left}° and {right}°. Is it A: acute, B: right, or C: obtuse?",
        lines=_triangle(left, right),
        labels=_labels((LOWER_LEFT, str(left)), (LOWER_RIGHT, str(right))),
        thought=f"180-{left}-{right}={third}",
        answer=target,
    )


def _perimeter(rng: np.random.Generator) -> Figure:
    """Ask for the perimeter of a rectangle of unit squares; its sides are only in the image."""
    width, height, units = _rectangle(rng)
    return Figure(
        question="What is the perimeter of the rectangle of unit squares?",
        lines=(),
        labels=units,
        thought=f"2*({width}+{height})={2 * (width + height)}",
        answer=str(2 * (width + height)),
    )


def _area(rng: np.random.Generator) -> Figure:
    """Ask for the area of a rectangle of unit squares; its sides are only in the image."""
    width, height, units = _rectangle(rng)
    return Figure(
        question="What is the area of the rectangle of unit squares?",
        lines=(),
        labels=units,
        thought=f"{width}*{height}={width * height}",
        answer=str(width * height),
    )


PROBLEMS: dict[str, Callable[[np.random.Generator], Figure]] = {
    "straight_line": _straight_line,
    "third_angle": _third_angle,
    "type_of_triangle": _type_of_triangle,
    "perimeter": _perimeter,
    "area": _area,
}


def _angles(rng: np.random.Generator) -> tuple[int, int, int]:
    """Sample the angles of a triangle in degrees: base left, base right, apex."""
    while True:
        left, right = (int(angle) for angle in rng.choice(ANGLES, size=2))
        if left + right <= 160:
            return left, right, 180 - left - right


def _triangle(left: int, right: int) -> Lines:
    """Return the sides of the largest triangle that fits, with these angles in degrees at its base."""
    # With the left corner at 0 and a base of 1, the law of sines gives the left side.
    side = math.sin(math.radians(right)) / math.sin(math.radians(left + right))
    apex_x, apex_y = side * math.cos(math.radians(left)), side * math.sin(math.radians(left))
    scale = min(RIGHT - LEFT, (FLOOR - TOP) / apex_y)
    start = (WIDTH - scale) / 2
    base_left, base_right = (start, FLOOR), (start + scale, FLOOR)
    apex = (start + scale * apex_x, FLOOR - scale * apex_y)
    return (base_left, base_right), (base_right, apex), (apex, base_left)


def _rectangle(rng: np.random.Generator) -> tuple[int, int, Labels]:
    """Sample a rectangle on the grid: its width, its height and the labels of its unit squares."""
    width, height = int(rng.integers(1, COLUMNS + 1)), int(rng.integers(1, ROWS + 1))
    left, top = int(rng.integers(COLUMNS - width + 1)), int(rng.integers(ROWS - height + 1))
    cells = ((top + row) * COLUMNS + left + column for row in range(height) for column in range(width))
    return width, height, _labels(*((cell, UNIT) for cell in cells))


def _labels(*labels: tuple[int, str]) -> Labels:
    return tuple(sorted(labels))


def _generator(use: str, split: Split, index: int) -> np.random.Generator:
    key = (SEED, ("kinds", "scene").index(use), ("train", "test").index(split), index)
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))
