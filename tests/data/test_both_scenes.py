"""Counting and geometry in turn."""

from __future__ import annotations

import pytest

from othink_ray.config.load import load
from othink_ray.data import open_source

BOTH, COUNTING, GEOMETRY = (load([f"data={name}"]).data for name in ("both", "counting", "geometry"))


@pytest.mark.parametrize("split", ["train", "test"])
def test_rows_alternate_between_those_of_the_two_tasks(split: str) -> None:
    both = open_source(BOTH, split)  # type: ignore[arg-type]
    for number in range(6):
        assert both.prompt(2 * number) == open_source(COUNTING, split).prompt(number)  # type: ignore[arg-type]
        assert both.prompt(2 * number + 1) == open_source(GEOMETRY, split).prompt(number)  # type: ignore[arg-type]


def test_there_are_as_many_rows_as_the_config_says() -> None:
    both = open_source(BOTH, "test")
    assert len(both) == BOTH.test.size
    with pytest.raises(IndexError, match="0 to 255, not 256"):
        both.prompt(256)
