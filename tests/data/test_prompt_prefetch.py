"""Read-ahead returns the same prompts as a plain stream, and has them ready in advance."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from othink_ray.data import BadRow, PromptStream
from othink_ray.types import Prompt
from tests.data.test_stream import Rows, take

Make = Callable[..., PromptStream]


@pytest.fixture
def open_stream() -> Iterator[Make]:
    streams: list[PromptStream] = []

    def make(rows: Rows, *, prefetch: int = 4, on_bad_row: str = "drop", position: int = 0) -> PromptStream:
        streams.append(PromptStream(rows, seed=5, on_bad_row=on_bad_row, position=position, prefetch=prefetch))
        return streams[-1]

    yield make
    for stream in streams:
        stream.close()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class RecordingRows(Rows):
    """Records the thread of each read; blocks after `block_after` reads until `resume` is set."""

    def __init__(self, size: int, block_after: int | None = None) -> None:
        super().__init__(size)
        self.read: list[str] = []
        self.resume = threading.Event()
        self.block_after = block_after

    def prompt(self, index: int) -> Prompt:
        if len(self.read) == self.block_after:
            assert self.resume.wait(20)
        self.read.append(threading.current_thread().name)
        return super().prompt(index)


@pytest.mark.parametrize("bad", [frozenset[int](), frozenset({0, 3, 4})])
@pytest.mark.parametrize("rows", [1, 4, 30])
@pytest.mark.parametrize("position", [0, 5, 20])
def test_rows_positions_and_drops_equal_those_of_a_plain_stream(
    open_stream: Make, bad: frozenset[int], rows: int, position: int
) -> None:
    plain = PromptStream(Rows(7, bad), seed=5, on_bad_row="drop", position=position)
    stream = open_stream(Rows(7, bad), prefetch=rows, position=position)
    for count in (1, 4, 0, 9, 16):
        assert take(stream, count) == take(plain, count)
        assert (stream.position, stream.dropped) == (plain.position, plain.dropped)


def test_rows_of_the_next_take_are_read_in_the_background(open_stream: Make) -> None:
    rows = RecordingRows(50)
    stream = open_stream(rows, prefetch=4)
    stream.take(4)
    wait_until(lambda: len(rows.read) == 8)
    assert threading.current_thread().name not in rows.read


@pytest.mark.parametrize("bad", [frozenset[int](), frozenset({0, 3, 4})])
def test_upcoming_prompts_are_the_start_of_the_next_take(open_stream: Make, bad: frozenset[int]) -> None:
    rows = RecordingRows(7)
    rows.bad = bad
    stream = open_stream(rows, prefetch=7)
    assert stream.upcoming() == []
    for count in (1, 4, 9, 3):
        stream.take(count)
        wait_until(lambda: len(rows.read) == stream.position + 7)
        upcoming = stream.upcoming()
        assert len(upcoming) >= 7 - 2 * len(bad)  # the window may span two epochs
        assert stream.take(len(upcoming)) == upcoming


def test_upcoming_does_not_wait_for_unread_rows(open_stream: Make) -> None:
    rows = RecordingRows(50, block_after=5)
    stream = open_stream(rows, prefetch=4)
    stream.take(3)
    wait_until(lambda: len(rows.read) == 5)
    assert len(stream.upcoming()) == 2
    rows.resume.set()


def test_without_prefetch_nothing_is_upcoming() -> None:
    stream = PromptStream(Rows(7), seed=5, on_bad_row="drop")
    stream.take(1)
    assert stream.upcoming() == []


def test_take_does_not_wait_for_rows_beyond_its_own(open_stream: Make) -> None:
    rows = RecordingRows(50, block_after=3)
    stream = open_stream(rows, prefetch=4)
    assert len(stream.take(3)) == 3
    assert len(rows.read) == 3
    rows.resume.set()
    assert len(stream.take(3)) == 3


def test_a_prefetched_bad_row_raises_when_it_is_taken(open_stream: Make) -> None:
    plain = PromptStream(Rows(6, frozenset({2})), seed=5, on_bad_row="stop")
    with pytest.raises(BadRow):
        plain.take(6)
    before = plain.position
    stream = open_stream(Rows(6, frozenset({2})), prefetch=6, on_bad_row="stop")
    assert len(stream.take(before)) == before
    for _ in range(2):
        with pytest.raises(BadRow, match="row rows/2: corrupt; fix it"):
            stream.take(1)
        assert stream.position == before


def test_nothing_is_read_after_close(open_stream: Make) -> None:
    rows = RecordingRows(50, block_after=2)
    stream = open_stream(rows, prefetch=10)
    stream.take(2)
    stream.close()
    rows.resume.set()
    wait_until(lambda: len(rows.read) == 3)  # the read in progress completes
    time.sleep(0.2)
    assert len(rows.read) == 3
