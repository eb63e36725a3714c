"""The mixture of counting and geometry rows."""

from __future__ import annotations

import pytest

from othink_ray.config.load import load
from othink_ray.data import Split, open_source

BOTH, COUNTING, GEOMETRY = (load([f"data={name}"]).data for name in ("both", "counting", "geometry"))


@pytest.mark.parametrize("split", ["train", "test"])
def test_rows_are_those_of_the_two_tasks_one_to_three(split: Split) -> None:
    both, counting, geometry = (open_source(data, split) for data in (BOTH, COUNTING, GEOMETRY))
    assert [both.prompt(row) for row in range(0, 24, 4)] == [counting.prompt(row) for row in range(6)]
    assert [both.prompt(row) for row in range(24) if row % 4] == [geometry.prompt(row) for row in range(18)]


def test_there_are_as_many_rows_as_the_config_says() -> None:
    both = open_source(BOTH, "test")
    assert len(both) == BOTH.test.size
    with pytest.raises(IndexError, match="0 to 255, not 256"):
        both.prompt(256)
