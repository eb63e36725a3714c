from __future__ import annotations

from dataclasses import replace

import pytest

from othink_ray.data import BadRow, PromptStream
from othink_ray.data.prompt_stream import told_apart
from othink_ray.types import Message, Prompt


class Rows:
    """A source of numbered questions, some of them bad."""

    def __init__(self, size: int, bad: frozenset[int] = frozenset()) -> None:
        self.size = size
        self.bad = bad

    def __len__(self) -> int:
        return self.size

    def prompt(self, index: int) -> Prompt:
        if index in self.bad:
            raise BadRow(f"rows/{index}", "torn", "mend it")
        message = Message(role="user", text="How many?")
        return Prompt(id=f"rows/{index}", messages=(message,), images=(), answer="1", task="counting")


def take(stream: PromptStream, n: int) -> list[str]:
    """The rows taken, without the number that tells repeats apart."""
    return [prompt.id.partition("#")[0] for prompt in stream.take(n)]


def test_each_epoch_shows_every_row_once_in_a_new_order() -> None:
    stream = PromptStream(Rows(20), seed=1, on_bad_row="stop")
    epochs = [take(stream, 20) for _ in range(3)]
    assert all(sorted(epoch) == sorted(epochs[0]) and len(set(epoch)) == 20 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_the_order_depends_on_the_seed_alone() -> None:
    def order(seed: int) -> list[str]:
        return take(PromptStream(Rows(20), seed=seed, on_bad_row="stop"), 50)

    assert order(1) == order(1)
    assert order(1) != order(2)


def test_the_size_of_a_take_does_not_change_the_order() -> None:
    whole = take(PromptStream(Rows(7), seed=3, on_bad_row="stop"), 30)
    stream = PromptStream(Rows(7), seed=3, on_bad_row="stop")
    assert [row for n in (1, 4, 0, 9, 16) for row in take(stream, n)] == whole


def test_a_take_may_be_longer_than_an_epoch() -> None:
    assert len(take(PromptStream(Rows(2), seed=0, on_bad_row="stop"), 9)) == 9


def test_a_row_that_comes_twice_in_a_take_has_two_ids() -> None:
    prompts = PromptStream(Rows(3), seed=0, on_bad_row="stop").take(7)
    assert len({prompt.id for prompt in prompts}) == 7
    assert sorted(prompt.id for prompt in prompts[:6]) == sorted(
        f"rows/{row}{number}" for row in range(3) for number in ("", "#2")
    )
    assert [prompt.id for prompt in PromptStream(Rows(3), seed=0, on_bad_row="stop").take(3)] == [
        prompt.id for prompt in prompts[:3]
    ]


def test_ids_differ_from_those_asked_before_in_the_step() -> None:
    stream = PromptStream(Rows(3), seed=0, on_bad_row="stop")
    asked: list[Prompt] = []
    for count in (2, 2, 4, 1):
        asked += stream.take(count, beside=asked)
    assert sorted(prompt.id for prompt in asked) == sorted(
        f"rows/{row}{number}" for row in range(3) for number in ("", "#2", "#3")
    )


def test_an_id_that_looks_like_a_repeat_is_not_taken_twice() -> None:
    names = ["a", "a#2", "a", "a#2", "a"]
    prompts = [replace(Rows(1).prompt(0), id=name) for name in names]
    assert [prompt.id for prompt in told_apart(prompts)] == ["a", "a#2", "a#3", "a#2#2", "a#4"]
    assert [prompt.id for prompt in told_apart(prompts[:1], beside=prompts)] == ["a#3"]


def test_a_row_that_the_screen_refuses_is_dropped_like_a_bad_one() -> None:
    def screen(prompt: Prompt) -> None:
        if prompt.id == "rows/1":
            raise BadRow(prompt.id, "too long", "cut it")

    stream = PromptStream(Rows(3), seed=0, on_bad_row="drop", screen=screen)
    assert sorted(take(stream, 4)) == ["rows/0", "rows/0", "rows/2", "rows/2"]
    assert stream.dropped == [("rows/1", "too long")]
    with pytest.raises(BadRow, match="row rows/1: too long; cut it"):
        PromptStream(Rows(3), seed=0, on_bad_row="stop", screen=screen).take(3)


@pytest.mark.parametrize("bad", [frozenset[int](), frozenset({0, 3, 4})])
@pytest.mark.parametrize("taken", [0, 1, 5, 7, 8, 23])
def test_a_stream_resumed_at_a_position_goes_on_as_if_never_stopped(bad: frozenset[int], taken: int) -> None:
    stream = PromptStream(Rows(7, bad), seed=5, on_bad_row="drop")
    take(stream, taken)
    resumed = PromptStream(Rows(7, bad), seed=5, on_bad_row="drop", position=stream.position)
    assert take(resumed, 20) == take(stream, 20)
    assert resumed.position == stream.position


def test_the_position_counts_dropped_rows() -> None:
    stream = PromptStream(Rows(6, frozenset({1, 2})), seed=0, on_bad_row="drop")
    assert sorted(take(stream, 4)) == ["rows/0", "rows/3", "rows/4", "rows/5"]
    assert stream.position + (2 - len(stream.dropped)) == 6


def test_dropped_rows_are_named_once_with_their_reason() -> None:
    stream = PromptStream(Rows(6, frozenset({1, 2})), seed=0, on_bad_row="drop")
    assert stream.dropped == []
    take(stream, 40)
    assert sorted(stream.dropped) == [("rows/1", "torn"), ("rows/2", "torn")]


def test_stop_raises_the_bad_row_and_stays_before_it() -> None:
    stream = PromptStream(Rows(6, frozenset({2})), seed=0, on_bad_row="stop")
    with pytest.raises(BadRow, match="row rows/2: torn; mend it"):
        take(stream, 6)
    where = stream.position
    with pytest.raises(BadRow, match="row rows/2"):
        take(stream, 1)
    assert stream.position == where
    assert stream.dropped == []


@pytest.mark.parametrize("position", [0, 1, 4])
def test_a_source_of_bad_rows_ends_in_an_error_that_names_one(position: int) -> None:
    stream = PromptStream(Rows(5, frozenset(range(5))), seed=0, on_bad_row="drop", position=position)
    with pytest.raises(ValueError, match=r"all 5 rows of the data source are bad, the last one rows/\d: torn; check"):
        take(stream, 1)
    assert stream.position < 10


@pytest.mark.parametrize("seed", range(8))
def test_one_good_row_is_enough_even_when_bad_runs_of_two_epochs_meet(seed: int) -> None:
    stream = PromptStream(Rows(3, frozenset({0, 1})), seed=seed, on_bad_row="drop")
    assert take(stream, 25) == ["rows/2"] * 25


def test_a_source_without_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="the data source has 0 rows"):
        PromptStream(Rows(0), seed=0, on_bad_row="stop")


def test_an_unknown_rule_for_bad_rows_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data\.on_bad_row='skip' must be drop or stop"):
        PromptStream(Rows(1), seed=0, on_bad_row="skip")


def test_a_negative_position_is_refused() -> None:
    with pytest.raises(ValueError, match="data position -1 must be 0 or more"):
        PromptStream(Rows(1), seed=0, on_bad_row="stop", position=-1)
