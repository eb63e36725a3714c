"""The easy-VQA data set, its subsets, and the cache of fetched wheels."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from othink_ray.config.load import load
from othink_ray.config.validate import problems
from othink_ray.data import SourceError, open_source
from othink_ray.data.wheels import WheelError, fetch_wheel

COLORS = {"black", "blue", "brown", "gray", "green", "red", "teal", "yellow"}
SHAPES = {"circle", "rectangle", "triangle"}
WHEEL = "easy-vqa==1.0"


def answers(name: str, split: str, *overrides: str) -> list[str]:
    data = load([f"data={name}", "data.test.size=null", *overrides]).data
    source = open_source(data, split)  # type: ignore[arg-type]
    return [source.prompt(index).answer for index in range(0, len(source), 41)]


def test_open_questions_ask_only_for_colors_and_shapes() -> None:
    assert set(answers("easy_vqa", "train")) == set(answers("easy_vqa", "test")) == COLORS | SHAPES


def test_subsets_partition_the_questions_of_a_split() -> None:
    def count(subset: str) -> int:
        unlimited = ["data=easy_vqa", "data.test.size=null"]
        return len(open_source(load([*unlimited, f"data.test.files.subset={subset}"]).data, "test"))

    assert (count("open"), count("yes_no"), count("null")) == (2537, 7136, 9673)
    assert count("shape") + count("colour") == 2537
    assert set(answers("easy_vqa", "test", "data.test.files.subset=shape")) == SHAPES
    assert set(answers("easy_vqa", "test", "data.test.files.subset=colour")) == COLORS
    assert set(answers("easy_vqa", "test", "data.test.files.subset=yes_no")) == {"yes", "no"}
    assert len(open_source(load(["data=easy_vqa_all"]).data, "train")) == 38_575


def test_rows_have_distinct_ids_and_many_images() -> None:
    source = open_source(load(["data=easy_vqa"]).data, "train")
    prompts = [source.prompt(index) for index in range(60)]
    assert len({prompt.id for prompt in prompts}) == 60
    assert len({prompt.images for prompt in prompts}) > 10
    table_ids = [prompt.id.rpartition("/")[2] for prompt in prompts]
    assert table_ids == sorted(table_ids)


def test_an_unknown_subset_is_rejected_with_the_known_ones() -> None:
    [problem] = problems(load(["data=easy_vqa", "data.train.files.subset=opn"]), None)
    assert problem.subject == "data.train.files.subset = opn"
    assert "open, shape, colour, yes_no or null" in problem.rule


def test_a_wheel_is_fetched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = fetch_wheel(WHEEL)

    def fail(*arguments: object, **settings: object) -> None:
        raise AssertionError("fetched again")

    monkeypatch.setattr(subprocess, "run", fail)
    assert fetch_wheel(WHEEL) == wheel


def test_an_unavailable_wheel_is_named_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(WheelError, match=r"easy-vqa==1\.0 could not be fetched from PyPI: .*place its wheel in "):
        fetch_wheel(WHEEL)
    assert list((tmp_path / "othink_ray" / "wheels").iterdir()) == []
    with pytest.raises(SourceError, match=r"data\.test\.files\.path = easy-vqa==1\.0: easy-vqa==1\.0 could not be"):
        open_source(load(["data=easy_vqa"]).data, "test")
