from __future__ import annotations

from dataclasses import replace

import pytest

from othink_ray.data import BadRow, PromptStream
from othink_ray.data.prompt_stream import with_unique_ids
from othink_ray.types import Message, Prompt


class Rows:
    """A source of numbered prompts, some of them bad."""

    def __init__(self, size: int, bad: frozenset[int] = frozenset()) -> None:
        self.size = size
        self.bad = bad

    def __len__(self) -> int:
        return self.size

    def prompt(self, index: int) -> Prompt:
        if index in self.bad:
            raise BadRow(f"rows/{index}", "corrupt", "fix it")
        message = Message(role="user", text="How many?")
        return Prompt(id=f"rows/{index}", messages=(message,), images=(), answer="1", task="counting")


def take(stream: PromptStream, n: int) -> list[str]:
    """Return the ids of the next n prompts, without the suffix of repeated rows."""
    return [prompt.id.partition("#")[0] for prompt in stream.take(n)]


def test_each_epoch_has_every_row_once_in_a_new_order() -> None:
    stream = PromptStream(Rows(20), seed=1, on_bad_row="stop")
    epochs = [take(stream, 20) for _ in range(3)]
    assert all(sorted(epoch) == sorted(epochs[0]) and len(set(epoch)) == 20 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_the_order_depends_only_on_the_seed() -> None:
    def order(seed: int) -> list[str]:
        return take(PromptStream(Rows(20), seed=seed, on_bad_row="stop"), 50)

    assert order(1) == order(1)
    assert order(1) != order(2)


def test_the_size_of_a_take_does_not_change_the_order() -> None:
    expected = take(PromptStream(Rows(7), seed=3, on_bad_row="stop"), 30)
    stream = PromptStream(Rows(7), seed=3, on_bad_row="stop")
    assert [row for n in (1, 4, 0, 9, 16) for row in take(stream, n)] == expected


def test_a_take_may_be_longer_than_an_epoch() -> None:
    assert len(take(PromptStream(Rows(2), seed=0, on_bad_row="stop"), 9)) == 9


def test_a_row_repeated_in_a_take_gets_distinct_ids() -> None:
    prompts = PromptStream(Rows(3), seed=0, on_bad_row="stop").take(7)
    assert len({prompt.id for prompt in prompts}) == 7
    assert sorted(prompt.id for prompt in prompts[:6]) == sorted(
        f"rows/{row}{number}" for row in range(3) for number in ("", "#2")
    )
    assert [prompt.id for prompt in PromptStream(Rows(3), seed=0, on_bad_row="stop").take(3)] == [
        prompt.id for prompt in prompts[:3]
    ]


def test_ids_differ_from_prompts_requested_earlier() -> None:
    stream = PromptStream(Rows(3), seed=0, on_bad_row="stop")
    requested: list[Prompt] = []
    for count in (2, 2, 4, 1):
        requested += stream.take(count, beside=requested)
    assert sorted(prompt.id for prompt in requested) == sorted(
        f"rows/{row}{number}" for row in range(3) for number in ("", "#2", "#3")
    )


def test_an_id_with_a_repeat_suffix_stays_unique() -> None:
    names = ["a", "a#2", "a", "a#2", "a"]
    prompts = [replace(Rows(1).prompt(0), id=name) for name in names]
    assert [prompt.id for prompt in with_unique_ids(prompts)] == ["a", "a#2", "a#3", "a#2#2", "a#4"]
    assert [prompt.id for prompt in with_unique_ids(prompts[:1], beside=prompts)] == ["a#3"]


def test_a_row_rejected_by_the_length_filter_is_dropped() -> None:
    def length_filter(prompt: Prompt) -> None:
        if prompt.id == "rows/1":
            raise BadRow(prompt.id, "too long", "cut it")

    stream = PromptStream(Rows(3), seed=0, on_bad_row="drop", length_filter=length_filter)
    assert sorted(take(stream, 4)) == ["rows/0", "rows/0", "rows/2", "rows/2"]
    assert stream.dropped == [("rows/1", "too long; cut it")]
    with pytest.raises(BadRow, match="row rows/1: too long; cut it"):
        PromptStream(Rows(3), seed=0, on_bad_row="stop", length_filter=length_filter).take(3)


@pytest.mark.parametrize("bad", [frozenset[int](), frozenset({0, 3, 4})])
@pytest.mark.parametrize("taken", [0, 1, 5, 7, 8, 23])
def test_a_stream_resumes_exactly_at_a_position(bad: frozenset[int], taken: int) -> None:
    stream = PromptStream(Rows(7, bad), seed=5, on_bad_row="drop")
    take(stream, taken)
    resumed = PromptStream(Rows(7, bad), seed=5, on_bad_row="drop", position=stream.position)
    assert take(resumed, 20) == take(stream, 20)
    assert resumed.position == stream.position


def test_the_position_counts_dropped_rows() -> None:
    stream = PromptStream(Rows(6, frozenset({1, 2})), seed=0, on_bad_row="drop")
    assert sorted(take(stream, 4)) == ["rows/0", "rows/3", "rows/4", "rows/5"]
    assert stream.position + (2 - len(stream.dropped)) == 6


def test_dropped_rows_are_reported_once_with_a_reason() -> None:
    stream = PromptStream(Rows(6, frozenset({1, 2})), seed=0, on_bad_row="drop")
    assert stream.dropped == []
    take(stream, 40)
    assert sorted(stream.dropped) == [("rows/1", "corrupt; fix it"), ("rows/2", "corrupt; fix it")]


def test_stop_raises_the_bad_row_and_keeps_the_position() -> None:
    stream = PromptStream(Rows(6, frozenset({2})), seed=0, on_bad_row="stop")
    with pytest.raises(BadRow, match="row rows/2: corrupt; fix it"):
        take(stream, 6)
    position = stream.position
    with pytest.raises(BadRow, match="row rows/2"):
        take(stream, 1)
    assert stream.position == position
    assert stream.dropped == []


@pytest.mark.parametrize("position", [0, 1, 4])
def test_a_source_of_only_bad_rows_raises_and_names_one(position: int) -> None:
    stream = PromptStream(Rows(5, frozenset(range(5))), seed=0, on_bad_row="drop", position=position)
    with pytest.raises(
        ValueError, match=r"all 5 rows of the data source are bad, the last one rows/\d: corrupt; check"
    ):
        take(stream, 1)
    assert stream.position < 10


@pytest.mark.parametrize("seed", range(8))
def test_one_valid_row_suffices_across_epoch_boundaries(seed: int) -> None:
    stream = PromptStream(Rows(3, frozenset({0, 1})), seed=seed, on_bad_row="drop")
    assert take(stream, 25) == ["rows/2"] * 25


def test_a_source_without_rows_is_rejected() -> None:
    with pytest.raises(ValueError, match="the data source has 0 rows"):
        PromptStream(Rows(0), seed=0, on_bad_row="stop")


def test_an_unknown_on_bad_row_is_rejected() -> None:
    with pytest.raises(ValueError, match=r"data\.on_bad_row='skip' must be drop or stop"):
        PromptStream(Rows(1), seed=0, on_bad_row="skip")


def test_a_negative_position_is_rejected() -> None:
    with pytest.raises(ValueError, match="data position -1 must be 0 or more"):
        PromptStream(Rows(1), seed=0, on_bad_row="stop", position=-1)
