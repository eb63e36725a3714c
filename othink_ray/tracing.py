"""Tracing of one process, for the timeline of a run's first steps: spans are dropped unless recording is on."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """One interval of work on one thread. Times are time.time(): spans of different hosts align as their clocks do."""

    name: str
    start_s: float
    end_s: float
    thread: str
    about: Mapping[str, Any]  # attributes shown with the span
    beside: bool  # may overlap other spans of its thread, instead of nesting in them


@dataclass(frozen=True, slots=True, kw_only=True)
class Spans:
    """The spans of one process."""

    host: str
    pid: int
    spans: list[Span]


_recorded: list[Span] | None = None  # None: recording is off


@contextmanager
def span(name: str, **about: Any) -> Iterator[None]:
    """Record the enclosed block as a span; works as a decorator too."""
    start_s = time.time()
    try:
        yield
    finally:
        keep(name, start_s, **about)


def keep(name: str, start_s: float, *, beside: bool = False, **about: Any) -> None:
    """Record a span that started at `start_s` and ends now."""
    if _recorded is not None:
        thread = threading.current_thread().name
        _recorded.append(Span(name=name, start_s=start_s, end_s=time.time(), thread=thread, about=about, beside=beside))


def take(*, go_on: bool) -> Spans:
    """Return the spans recorded since the last call, and turn recording on or off for what follows."""
    global _recorded
    taken, _recorded = _recorded or [], [] if go_on else None
    return Spans(host=socket.gethostname(), pid=os.getpid(), spans=taken)


T = TypeVar("T")


class Clock:
    """Stopwatch whose laps, in seconds, each start where the previous one ended: together they add up to the step.

    Laps of the same name are summed.
    """

    def __init__(self) -> None:
        self.times: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.times[name] = self.times.get(name, 0.0) + now - self._last
        self._last = now

    def lap_at_end(self, name: str, items: Iterable[T]) -> Iterator[T]:
        """Yield from `items` and end the lap after the last one."""
        yield from items
        self.lap(name)
