from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from othink_ray.data import BadRow, worked_answer
from othink_ray.data.sources import RowReader, solution
from tests.data.files import own_data, picture


def read(row: dict[str, Any], folder: Path = Path(), *, outside: bool = False, **columns: Any) -> Any:
    data = own_data(".", source="hub", image_root=str(folder), **columns)
    data = replace(data, images_outside_root=outside)
    return RowReader(data, "train").prompt("custom/train/000007", row)


def row(image: Any, **changes: Any) -> dict[str, Any]:
    return {"image": image, "problem": "How many?", "solution": "<answer> 3 </answer>"} | changes


# ---- images


@pytest.mark.parametrize(
    "wrap", [lambda data: data, lambda data: {"bytes": data, "path": None}], ids=["bytes", "struct"]
)
def test_an_image_may_be_bytes_or_a_struct(wrap: Any) -> None:
    assert read(row(wrap(picture(1)))).images == (picture(1),)


def test_an_image_may_be_a_path_from_the_image_root(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "1.png").write_bytes(picture(1))
    paths = ["deep/1.png", "./deep/1.png", str(tmp_path / "deep" / "1.png"), {"bytes": None, "path": "deep/1.png"}]
    assert all(read(row(path), tmp_path).images == (picture(1),) for path in paths)


def test_one_column_may_hold_several_images() -> None:
    prompt = read(row([picture(1), {"bytes": picture(2), "path": None}], problem="Which has more?"))
    assert prompt.images == (picture(1), picture(2))
    assert prompt.messages[0].images == 2


def test_several_columns_may_hold_images_and_may_be_empty() -> None:
    rows = {"left": picture(1), "middle": None, "right": [picture(2)], "problem": "Which?", "solution": "2"}
    assert read(rows, image="left, middle,right").images == (picture(1), picture(2))


def test_questions_without_images_need_no_image_column() -> None:
    prompt = read({"problem": "1 + 2?", "solution": "3"}, image=None)
    assert (prompt.images, prompt.messages[0].images) == ((), 0)


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (None, "no image in column image"),
        ([], "no image in column image"),
        (17, "column image must hold image bytes or a path, not 17"),
        ("", "column image must hold image bytes or a path, not ''"),
        ({"bytes": None, "path": None}, "column image must hold image bytes or a path, not None"),
        ({}, "column image must hold image bytes or a path, not None"),
        (b"text", r"image 1 \(4 bytes\) cannot be decoded"),
        ("none.png", "image file .*none.png cannot be read: FileNotFoundError"),
        ("nul\0.png", "image file .* cannot be read: ValueError"),
        (".", "image file .* cannot be read: IsADirectoryError"),
    ],
)
def test_an_unreadable_image_names_row_and_column(image: Any, reason: str) -> None:
    with pytest.raises(BadRow, match=f"^row custom/train/000007: {reason}"):
        read(row(image))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with an image root and, outside it, a secret image."""
    (tmp_path / "root").mkdir()
    (tmp_path / "secret.png").write_bytes(picture(1))
    (tmp_path / "root" / "link.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "root" / "zero").symlink_to("/dev/zero")
    (tmp_path / "root" / "within.png").symlink_to(tmp_path / "root" / "1.png")
    (tmp_path / "root" / "1.png").write_bytes(picture(2))
    os.mkfifo(tmp_path / "root" / "pipe")
    return tmp_path


@pytest.mark.parametrize(
    "path", ["../secret.png", "{}/secret.png", "link.png", "/dev/zero", "zero", "/proc/self/environ"]
)
def test_an_image_outside_the_root_needs_permission(path: str, folder: Path) -> None:
    with pytest.raises(BadRow, match=r"is outside .*; move it there, .* data\.images_outside_root=true"):
        read(row(path.format(folder)), folder / "root")
    if path.endswith(".png"):
        assert read(row(path.format(folder)), folder / "root", outside=True).images == (picture(1),)


def test_a_link_within_the_image_root_is_followed(folder: Path) -> None:
    assert read(row("within.png"), folder / "root").images == (picture(2),)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("path", ["pipe", "/dev/zero", "/dev/tty", "zero"])
def test_devices_and_pipes_are_not_read(path: str, folder: Path) -> None:
    with pytest.raises(BadRow, match=r"is not a regular file|cannot be read: OSError"):
        read(row(path), folder / "root", outside=True)


def test_an_oversized_image_file_is_rejected(folder: Path) -> None:
    with (folder / "root" / "huge.png").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(BadRow, match="is larger than 256 MiB; use a smaller image file"):
        read(row("huge.png"), folder / "root")


# ---- questions and answers


def test_image_markers_are_removed_from_the_question() -> None:
    prompt = read(row(picture(1), problem="<image>\nFind x."))
    assert prompt.messages[0].text.startswith("Find x. Output the thinking")


def test_a_wrong_number_of_image_markers_is_a_bad_row() -> None:
    with pytest.raises(BadRow, match=r"its question has 2 <image> marker\(s\) but the row has 1 image\(s\)"):
        read(row(picture(1), problem="<image> or <image>?"))


@pytest.mark.parametrize("question", [None, "", "  ", "<image>"])
def test_a_prompt_suffix_alone_is_not_a_question(question: str | None) -> None:
    with pytest.raises(BadRow, match="the question is empty"):
        read(row(picture(1), problem=question))


@pytest.mark.parametrize("answer", [None, "", "<answer> </answer>", "<think> hm </think><answer></answer>"])
def test_a_missing_answer_is_a_bad_row(answer: str | None) -> None:
    with pytest.raises(BadRow, match="the answer is missing"):
        read(row(picture(1), solution=answer))


@pytest.mark.parametrize(
    ("text", "thought", "answer"),
    [
        ("3", "", "3"),
        (" <answer> 3 </answer> ", "", "3"),
        ("<think> two and one </think>\n<answer> 3 </answer>", "two and one", "3"),
        ("<think>a\nb</think><answer>2\\sqrt{3}</answer>", "a\nb", "2\\sqrt{3}"),
        ("x < 3", "", "x < 3"),
    ],
)
def test_a_solution_is_split_into_thought_and_answer(text: str, thought: str, answer: str) -> None:
    assert solution(text) == (thought, answer)


@pytest.mark.parametrize(("value", "answer"), [(4, "4"), (4.5, "4.5"), ("145°", "145°"), (0, "0")])
def test_an_answer_may_be_a_number_or_text(value: Any, answer: str) -> None:
    assert read(row(picture(1), solution=value)).answer == answer


def test_the_thought_of_the_data_set_is_the_sft_target() -> None:
    prompt = read(row(picture(1), solution="<think> two and one </think><answer> 3 </answer>"))
    assert (prompt.thought, prompt.answer) == ("two and one", "3")
    assert worked_answer(prompt) == "<think> two and one </think><answer> 3 </answer>"
