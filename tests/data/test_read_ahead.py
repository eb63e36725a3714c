"""A stream that reads ahead gives what one gives that does not, and has it ready."""

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
def ahead() -> Iterator[Make]:
    made: list[PromptStream] = []

    def make(rows: Rows, *, ahead: int = 4, on_bad_row: str = "drop", position: int = 0) -> PromptStream:
        made.append(PromptStream(rows, seed=5, on_bad_row=on_bad_row, position=position, ahead=ahead))
        return made[-1]

    yield make
    for stream in made:
        stream.close()


def wait_until(true: Callable[[], bool]) -> None:
    until = time.monotonic() + 20
    while not true():
        assert time.monotonic() < until
        time.sleep(0.01)


class Watched(Rows):
    """Notes what is read; `held` rows wait until they are let go."""

    def __init__(self, size: int, held: int | None = None) -> None:
        super().__init__(size)
        self.read: list[str] = []
        self.let_go = threading.Event()
        self.held = held

    def prompt(self, index: int) -> Prompt:
        if len(self.read) == self.held:
            assert self.let_go.wait(20)
        self.read.append(threading.current_thread().name)
        return super().prompt(index)


@pytest.mark.parametrize("bad", [frozenset[int](), frozenset({0, 3, 4})])
@pytest.mark.parametrize("rows", [1, 4, 30])
@pytest.mark.parametrize("position", [0, 5, 20])
def test_rows_positions_and_drops_are_those_of_a_stream_that_does_not(
    ahead: Make, bad: frozenset[int], rows: int, position: int
) -> None:
    plain = PromptStream(Rows(7, bad), seed=5, on_bad_row="drop", position=position)
    stream = ahead(Rows(7, bad), ahead=rows, position=position)
    for count in (1, 4, 0, 9, 16):
        assert take(stream, count) == take(plain, count)
        assert (stream.position, stream.dropped) == (plain.position, plain.dropped)


def test_the_rows_of_the_next_take_are_there_before_it(ahead: Make) -> None:
    rows = Watched(50)
    stream = ahead(rows, ahead=4)
    stream.take(4)
    wait_until(lambda: len(rows.read) == 8)
    assert threading.current_thread().name not in rows.read


@pytest.mark.parametrize("bad", [frozenset[int](), frozenset({0, 3, 4})])
def test_what_is_coming_is_what_the_next_take_begins_with(ahead: Make, bad: frozenset[int]) -> None:
    rows = Watched(7)
    rows.bad = bad
    stream = ahead(rows, ahead=7)
    assert stream.upcoming() == []
    for count in (1, 4, 9, 3):
        stream.take(count)
        wait_until(lambda: len(rows.read) == stream.position + 7)
        coming = stream.upcoming()
        assert len(coming) >= 7 - 2 * len(bad)  # two epochs may meet here
        assert stream.take(len(coming)) == coming


def test_what_is_not_read_yet_is_not_waited_for(ahead: Make) -> None:
    rows = Watched(50, held=5)
    stream = ahead(rows, ahead=4)
    stream.take(3)
    wait_until(lambda: len(rows.read) == 5)
    assert len(stream.upcoming()) == 2
    rows.let_go.set()


def test_a_stream_that_does_not_read_ahead_knows_of_nothing_to_come() -> None:
    stream = PromptStream(Rows(7), seed=5, on_bad_row="drop")
    stream.take(1)
    assert stream.upcoming() == []


def test_a_take_does_not_wait_for_rows_that_it_was_not_asked_for(ahead: Make) -> None:
    rows = Watched(50, held=3)
    stream = ahead(rows, ahead=4)
    assert len(stream.take(3)) == 3
    assert len(rows.read) == 3
    rows.let_go.set()
    assert len(stream.take(3)) == 3


def test_a_bad_row_that_was_read_ahead_is_told_when_it_is_asked_for(ahead: Make) -> None:
    plain = PromptStream(Rows(6, frozenset({2})), seed=5, on_bad_row="stop")
    with pytest.raises(BadRow):
        plain.take(6)
    before = plain.position
    stream = ahead(Rows(6, frozenset({2})), ahead=6, on_bad_row="stop")
    assert len(stream.take(before)) == before
    for _ in range(2):
        with pytest.raises(BadRow, match="row rows/2: torn; mend it"):
            stream.take(1)
        assert stream.position == before


def test_after_close_nothing_more_is_read(ahead: Make) -> None:
    rows = Watched(50, held=2)
    stream = ahead(rows, ahead=10)
    stream.take(2)
    stream.close()
    rows.let_go.set()
    wait_until(lambda: len(rows.read) == 3)  # the one at hand
    time.sleep(0.2)
    assert len(rows.read) == 3
