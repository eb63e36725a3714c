from __future__ import annotations

import hashlib
import io
import itertools
import math
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from othink_ray.config.load import load
from othink_ray.data import worked_answer
from othink_ray.data.prompts import Split
from othink_ray.data.scenes.counting import BACKGROUND, CELL, TINT
from othink_ray.data.scenes.geometry import (
    ANGLES,
    COLORS,
    COLUMNS,
    GLYPHS,
    HEIGHT,
    INK,
    PROBLEMS,
    ROWS,
    SHIFT,
    UNIT,
    WIDTH,
    Figure,
    GeometryScenes,
    Labels,
    draw_label,
    draw_problem,
    render,
    split_of,
)
from othink_ray.rewards import accuracy, format_reward

DATA = load(["data=geometry"]).data
GOLDEN = [
    ("train", 0, "750a0c16cfe0a7d8c83c35814410ccb172404d09c4e2f469b17a9a3c9adc1b03"),
    ("train", 4095, "675708f5d0d69c67aaabe19648868117ae51e49a3d83be14c7b790c4bc781767"),
    ("test", 0, "8e7a85010224ce46c519a4335c90702b638dc9a79aa28ab0777836db047f93a6"),
    ("test", 123, "9e3f44d05adfc2e48c8310ef8135c405af527257fc0bd98f5c477587e0181bbb"),
]
SPLITS: tuple[Split, Split] = ("train", "test")


def pixels(scenes: GeometryScenes, index: int) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(scenes.prompt(index).images[0])) as image:
        return np.asarray(image)


def digest(scenes: GeometryScenes, index: int) -> str:
    return hashlib.sha256(pixels(scenes, index).tobytes()).hexdigest()


def problems(kind: str, split: Split = "train", count: int = 40) -> list[tuple[Figure, str]]:
    rng = np.random.Generator(np.random.PCG64(7))
    return [draw_problem(rng, kind, split) for _ in range(count)]


def label_masks() -> dict[bytes, str]:
    """Return the text of every label by its ink mask within the cell, for all positions it may have."""
    texts = [*map(str, ANGLES), "?"]
    texts_by_mask: dict[bytes, str] = {}
    for text, dx, dy in itertools.product(texts, *2 * [range(-SHIFT, SHIFT + 1)]):
        canvas = Image.new("RGB", (CELL, CELL), (255, 255, 255))
        draw_label(ImageDraw.Draw(canvas), text, CELL // 2 + dx, CELL // 2 + dy, (255, 255, 255))
        ink = (np.asarray(canvas) == INK).all(axis=-1)
        assert not (ink[0].any() or ink[-1].any() or ink[:, 0].any() or ink[:, -1].any()), "a label stays in its cell"
        assert texts_by_mask.setdefault(ink.tobytes(), text) == text
    return texts_by_mask


def read_off(image: NDArray[np.uint8]) -> tuple[Labels, str]:
    """Recover labels and color from the pixels alone."""
    texts = label_masks()
    [color] = [name for name, tone in COLORS.items() if near(image, tone).any()]
    labels = []
    for cell in range(ROWS * COLUMNS):
        row, column = divmod(cell, COLUMNS)
        part = image[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL]
        ink = (part == INK).all(axis=-1)
        if ink.any():
            labels.append((cell, texts[ink.tobytes()]))
        elif near(part, COLORS[color]).sum() == (CELL - 2) ** 2:
            labels.append((cell, UNIT))
    return tuple(labels), color


def near(image: NDArray[np.uint8], tone: tuple[int, int, int]) -> NDArray[np.bool_]:
    return np.asarray((np.abs(image.astype(int) - np.array(tone)) <= TINT).all(axis=-1))


def test_a_problem_is_a_question_with_one_image() -> None:
    prompt = GeometryScenes(DATA, "test").prompt(12)
    assert prompt.id == "geometry_scenes/test/000012"
    assert prompt.task == "geometry"
    assert len(prompt.images) == prompt.messages[0].images == 1
    assert prompt.messages[0].text.endswith(f"? {DATA.prompt_suffix}")
    with Image.open(io.BytesIO(prompt.images[0])) as image:
        assert (image.format, image.mode, image.size, image.info) == ("PNG", "RGB", (WIDTH, HEIGHT), {})


@pytest.mark.parametrize(("split", "index", "expected"), GOLDEN)
def test_the_pixels_of_a_problem_never_change(split: Split, index: int, expected: str) -> None:
    assert digest(GeometryScenes(DATA, split), index) == expected


def test_a_problem_does_not_depend_on_the_size_of_its_split() -> None:
    longer = replace(DATA, train=replace(DATA.train, size=9999))
    assert GeometryScenes(longer, "train").prompt(77) == GeometryScenes(DATA, "train").prompt(77)


def test_every_kind_of_problem_is_equally_frequent() -> None:
    scenes = GeometryScenes(DATA, "train")
    texts = [re.sub(r"\d+", "N", scenes.prompt(index).messages[0].text) for index in range(10 * len(PROBLEMS))]
    assert sorted(Counter(texts).values()) == [10] * len(PROBLEMS)
    assert texts[: len(PROBLEMS)] != texts[len(PROBLEMS) : 2 * len(PROBLEMS)]


# ---- answers


@pytest.mark.parametrize("kind", ["third_angle", "type_of_triangle"])
def test_a_triangle_is_to_scale_with_angles_adding_up_to_180(kind: str) -> None:
    for figure, _ in problems(kind):
        left, right = (int(text) for _, text in figure.labels)
        third = 180 - left - right
        assert [int(number) for number in re.findall(r"\d+", figure.question)] == [left, right]
        (one, other), (_, apex), _ = figure.lines
        assert angle(one, other, apex) == pytest.approx(left)
        assert angle(other, one, apex) == pytest.approx(right)
        largest = max(left, right, third)
        triangle_type = "A" if largest < 90 else "B" if largest == 90 else "C"
        assert figure.answer == (f"{third}°" if kind == "third_angle" else triangle_type)
        assert figure.thought == f"180-{left}-{right}={third}"


def test_angles_on_a_line_are_to_scale_and_add_up_to_180() -> None:
    sides = set()
    for figure, _ in problems("straight_line"):
        [(cell, given)] = [(cell, text) for cell, text in figure.labels if text != "?"]
        (left, right), (foot, end) = figure.lines
        sides.add(cell)
        beside = right if cell == max(cell for cell, _ in figure.labels) else left
        assert angle(foot, beside, end) == pytest.approx(int(given))
        assert figure.answer == f"{180 - int(given)}°"
        assert re.findall(r"\d+", figure.question) == [given]
    assert len(sides) == 2


@pytest.mark.parametrize("kind", ["perimeter", "area"])
def test_a_rectangle_of_unit_squares_has_its_perimeter_and_area(kind: str) -> None:
    for figure, _ in problems(kind):
        rows = {cell // COLUMNS for cell, _ in figure.labels}
        columns = {cell % COLUMNS for cell, _ in figure.labels}
        assert len(figure.labels) == len(rows) * len(columns)
        assert max(rows) - min(rows) == len(rows) - 1
        assert max(columns) - min(columns) == len(columns) - 1
        expected = 2 * (len(rows) + len(columns)) if kind == "perimeter" else len(rows) * len(columns)
        assert figure.answer == str(expected)
        assert not re.search(r"\d", figure.question), "the sides are only in the image"


def test_types_of_triangle_are_about_equally_frequent() -> None:
    found = Counter(figure.answer for figure, _ in problems("type_of_triangle", count=150))
    assert set(found) == {"A", "B", "C"}
    assert min(found.values()) > 30


def angle(at: tuple[float, float], one: tuple[float, float], other: tuple[float, float]) -> float:
    """Return the angle in degrees at a point between two others."""
    turns = [math.atan2(at[1] - point[1], point[0] - at[0]) for point in (one, other)]
    return abs((math.degrees(turns[1] - turns[0]) + 180) % 360 - 180)


@pytest.mark.parametrize("split", SPLITS)
def test_figures_stay_inside_the_image(split: Split) -> None:
    for kind in PROBLEMS:
        for figure, _ in problems(kind, split):
            for x, y in itertools.chain.from_iterable(figure.lines):
                assert 2 <= x <= WIDTH - 3
                assert 2 <= y <= 2 * CELL


@pytest.mark.parametrize("split", SPLITS)
def test_the_worked_answer_earns_both_rewards(split: Split) -> None:
    scenes = GeometryScenes(DATA, split)
    for index in range(2 * len(PROBLEMS)):
        prompt = scenes.prompt(index)
        assert accuracy(worked_answer(prompt), prompt.answer) == 1.0
        assert format_reward(worked_answer(prompt)) == 1.0
        assert prompt.thought in worked_answer(prompt)


# ---- train and test are disjoint


@pytest.mark.parametrize("split", SPLITS)
def test_pixels_determine_labels_color_and_split(split: Split) -> None:
    """Labels and color determine the split, so the pixels do, so no image can be in both splits."""
    rng = np.random.Generator(np.random.PCG64(3))
    for kind in PROBLEMS:
        for figure, color in problems(kind, split, count=12):
            labels, found = read_off(np.asarray(render(figure, color, rng)))
            assert (labels, found) == (figure.labels, color)
            assert split_of(labels, found) == split


def test_tones_and_glyphs_are_distinguishable() -> None:
    tones = [BACKGROUND, INK, *COLORS.values()]
    for one, other in itertools.combinations(tones, 2):
        assert any(abs(a - b) > 2 * TINT for a, b in zip(one, other, strict=True))
    assert len(set(GLYPHS.values())) == len(GLYPHS)
    assert set(GLYPHS) == set("0123456789?")


def test_no_image_of_one_split_occurs_in_the_other() -> None:
    train, test = ({digest(GeometryScenes(DATA, split), index) for index in range(200)} for split in SPLITS)
    assert len(train) > 190
    assert len(test) > 190
    assert train.isdisjoint(test)
