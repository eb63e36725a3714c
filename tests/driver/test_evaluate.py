"""Held-out questions: bad rows are named, intervals are Wilson's."""

from __future__ import annotations

import pytest

from othink_ray.config.load import load
from othink_ray.data import BadRow, SourceError, open_source
from othink_ray.driver.evaluate import held_out_prompts, wilson
from othink_ray.types import Prompt


class EveryThirdIsBad:
    """The embedded test questions, with bad rows among them."""

    def __init__(self) -> None:
        self.source = open_source(load([]).data, "test")

    def __len__(self) -> int:
        return len(self.source)

    def prompt(self, index: int) -> Prompt:
        if index % 3 == 0:
            raise BadRow(f"row-{index}", "the question is empty", "fill it in")
        return self.source.prompt(index)


def test_bad_rows_are_dropped_and_named_and_others_take_their_place() -> None:
    prompts, bad = held_out_prompts(EveryThirdIsBad(), 4, "drop")
    assert len(prompts) == 4
    assert [row.row_id for row in bad] == ["row-0", "row-3"]


def test_the_first_bad_row_stops_a_run_that_wants_it_so() -> None:
    with pytest.raises(BadRow, match="row-0"):
        held_out_prompts(EveryThirdIsBad(), 4, "stop")


def test_a_short_source_gives_what_it_has() -> None:
    prompts, _ = held_out_prompts(EveryThirdIsBad(), 10_000, "drop")
    assert len(prompts) == 256 - 86


@pytest.mark.parametrize(
    ("right", "trials", "lo", "hi"), [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (127, 256, 0.4353, 0.5570)]
)
def test_intervals_are_wilsons(right: int, trials: int, lo: float, hi: float) -> None:
    assert wilson(right, trials) == pytest.approx((lo, hi), abs=1e-3)


def test_rows_that_the_screen_refuses_are_bad_rows_and_a_set_of_them_is_refused() -> None:
    def too_long(prompt: Prompt) -> None:
        if not prompt.id.endswith("4"):
            raise BadRow(prompt.id, "too long", "cut it")

    source = open_source(load([]).data, "test")
    prompts, bad = held_out_prompts(source, 2, "drop", too_long)
    assert [prompt.id for prompt in prompts] == ["scenes/test/000004", "scenes/test/000014"]
    assert len(bad) == 13

    def never(prompt: Prompt) -> None:
        raise BadRow(prompt.id, "too long", "cut it")

    with pytest.raises(SourceError, match=r"all 256 held-out rows are bad, the first one: row scenes/test/0+: too"):
        held_out_prompts(source, 2, "drop", never)
