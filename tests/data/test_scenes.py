from __future__ import annotations

import hashlib
import io
import itertools
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from othink_ray.config.schema import DataConfig, PartConfig, ScenesConfig
from othink_ray.data import open_source, validate, worked_answer
from othink_ray.data.prompts import Split
from othink_ray.data.scenes.counting import (
    BACKGROUND,
    CELL,
    COLORS,
    MARGIN,
    RADII,
    RGB,
    SHAPES,
    TINT,
    SceneCounting,
    draw_item,
    draw_layout,
    max_offset,
    split_of,
)
from othink_ray.rewards import accuracy, format_reward

DATA = DataConfig(
    name="counting",
    task="counting",
    prompt_suffix="Answer in <answer> </answer> tags.",
    blind=False,
    on_bad_row="stop",
    images_outside_root=False,
    warm_steps=45,
    scenes=ScenesConfig(max_items=6, image_cells=3),
    train=PartConfig(source="scenes", size=2000, files=None),
    test=PartConfig(source="scenes", size=200, files=None),
)
SPLITS: tuple[Split, Split] = ("train", "test")


def sized(data: DataConfig, train: int, test: int) -> DataConfig:
    return replace(data, train=replace(data.train, size=train), test=replace(data.test, size=test))


def pixels(scenes: SceneCounting, index: int) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(scenes.prompt(index).images[0])) as image:
        return np.asarray(image)


def digest(scenes: SceneCounting, index: int) -> str:
    return hashlib.sha256(pixels(scenes, index).tobytes()).hexdigest()


def foreground(image: NDArray[np.uint8]) -> NDArray[np.bool_]:
    return np.asarray(image.min(axis=-1) < min(BACKGROUND) - TINT)


def test_a_scene_is_a_question_with_an_image_and_a_count() -> None:
    prompt = SceneCounting(DATA, "test").prompt(12)
    assert prompt.id == "scenes/test/000012"
    assert prompt.task == "counting"
    assert [(message.role, message.text, message.images) for message in prompt.messages] == [
        ("user", "How many items are there in the image? Answer in <answer> </answer> tags.", 1)
    ]
    assert prompt.answer in {"1", "2", "3", "4", "5", "6"}
    assert validate(prompt) is prompt


@pytest.mark.parametrize(
    ("split", "index", "expected"),
    [
        ("train", 0, "fba784f56a982bc9dc24751e5c662e5e295c3ec6c8995f0dc602746d066bfa6e"),
        ("train", 1999, "45ca9a769816ab3826ea1c567a6442c513191f536efc5f93343ef91a405adfa4"),
        ("test", 0, "9e3da6f267fee75158d49ad684d8a69c9da92a60be1cd4777c0157ef0cfbf676"),
        ("test", 123, "227220e616d3124beb13f8ef50272cff026500ec3131ff68bf870c7783029b72"),
    ],
)
def test_the_pixels_of_a_scene_never_change(split: Split, index: int, expected: str) -> None:
    assert digest(SceneCounting(DATA, split), index) == expected


def test_a_scene_is_the_same_in_any_order_and_instance() -> None:
    forward = [SceneCounting(DATA, "train").prompt(index) for index in range(30)]
    scenes = SceneCounting(DATA, "train")
    assert [scenes.prompt(index) for index in reversed(range(30))] == forward[::-1]


def test_a_scene_does_not_depend_on_the_size_of_its_split() -> None:
    longer = sized(DATA, 9999, 1)
    assert SceneCounting(longer, "train").prompt(77) == SceneCounting(DATA, "train").prompt(77)


def test_a_png_carries_no_metadata() -> None:
    with Image.open(io.BytesIO(SceneCounting(DATA, "train").prompt(0).images[0])) as image:
        assert (image.format, image.mode, image.size, image.info) == ("PNG", "RGB", (84, 84), {})


@pytest.mark.parametrize(("split", "rows"), [("train", 120), ("test", 60)])
def test_every_count_is_equally_frequent(split: Split, rows: int) -> None:
    scenes = SceneCounting(DATA, split)
    counts = [scenes.prompt(index).answer for index in range(rows)]
    assert Counter(counts) == {str(count): rows // 6 for count in range(1, 7)}
    assert counts[:6] != counts[6:12]


@pytest.mark.parametrize("split", SPLITS)
def test_the_answer_is_the_number_of_occupied_cells(split: Split) -> None:
    scenes = SceneCounting(DATA, split)
    for index in range(60):
        cells = foreground(pixels(scenes, index)).reshape(3, CELL, 3, CELL).swapaxes(1, 2).reshape(9, CELL, CELL)
        assert cells.any(axis=(1, 2)).sum() == int(scenes.prompt(index).answer)
        inner = cells[:, MARGIN : CELL - MARGIN + 1, MARGIN : CELL - MARGIN + 1]
        assert inner.sum() == cells.sum()
        assert all(cell.sum() == 0 or cell.sum() > 100 for cell in cells)


@pytest.mark.parametrize("split", SPLITS)
def test_every_layout_of_a_split_belongs_to_it(split: Split) -> None:
    rng = np.random.Generator(np.random.PCG64(5))
    layouts = [draw_layout(rng, count, 3, split) for count in range(1, 7) for _ in range(50)]
    assert {split_of(layout) for layout in layouts} == {split}
    assert all(len({cell for cell, _, _ in layout}) == len(layout) for layout in layouts)


def test_the_layout_can_be_read_off_the_pixels() -> None:
    """Pixels determine the layout, and the layout its split, so no image can be in both splits."""

    def silhouette(shape: str, x: int, y: int, radius: int) -> bytes:
        canvas = Image.new("RGB", (CELL, CELL))
        draw_item(ImageDraw.Draw(canvas), shape, x, y, radius, (255, 255, 255))
        return canvas.tobytes()

    shapes_of: dict[bytes, set[str]] = {}
    for shape, radius in itertools.product(SHAPES, RADII):
        centers = range(CELL // 2 - max_offset(radius), CELL // 2 + max_offset(radius) + 1)
        for x, y in itertools.product(centers, centers):
            shapes_of.setdefault(silhouette(shape, x, y, radius), set()).add(shape)
    assert all(len(shapes) == 1 for shapes in shapes_of.values())

    def tints_overlap(one: RGB, other: RGB) -> bool:
        return all(abs(a - b) <= 2 * TINT for a, b in zip(one, other, strict=True))

    tones = [BACKGROUND, *COLORS.values()]
    assert not any(tints_overlap(one, other) for one, other in itertools.combinations(tones, 2))


@pytest.mark.parametrize(("cells", "items"), [(1, 1), (2, 2), (3, 6)])
def test_no_image_of_one_split_occurs_in_the_other(cells: int, items: int) -> None:
    data = sized(replace(DATA, scenes=ScenesConfig(max_items=items, image_cells=cells)), 400, 400)
    train, test = ({digest(SceneCounting(data, split), index) for index in range(400)} for split in SPLITS)
    assert len(train) > 300
    assert len(test) > 300
    assert train.isdisjoint(test)


def test_scenes_differ_from_row_to_row() -> None:
    scenes = SceneCounting(DATA, "train")
    assert len({digest(scenes, index) for index in range(300)}) == 300


def test_the_worked_answer_of_a_scene_earns_both_rewards() -> None:
    prompt = SceneCounting(DATA, "train").prompt(3)
    assert accuracy(worked_answer(prompt), prompt.answer) == 1.0
    assert format_reward(worked_answer(prompt)) == 1.0


@pytest.mark.parametrize(("split", "size"), [("train", 2000), ("test", 200)])
def test_a_row_outside_the_split_is_an_index_error(split: Split, size: int) -> None:
    scenes = SceneCounting(DATA, split)
    assert len(scenes) == size
    for index in (-1, size):
        with pytest.raises(IndexError, match=f"scenes/{split} has rows 0 to {size - 1}, not {index}"):
            scenes.prompt(index)


@pytest.mark.parametrize("items", [0, 10])
def test_an_invalid_number_of_items_is_rejected(items: int) -> None:
    with pytest.raises(ValueError, match=rf"data\.scenes\.max_items={items} must be from 1 to .*squared \(9\)"):
        SceneCounting(replace(DATA, scenes=ScenesConfig(max_items=items, image_cells=3)), "train")


def test_an_unknown_source_is_named_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"data\.train\.source='scene' is not a data source; choose one of: scenes"):
        open_source(replace(DATA, train=PartConfig(source="scene", size=9, files=None)), "train")
