"""What this process did and when, for the timeline of a run's first steps; nothing is kept unless somebody asked."""

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
    """One thing that a thread did. Times are time.time(): hosts agree on them as well as their clocks do."""

    name: str
    start_s: float
    end_s: float
    thread: str
    about: Mapping[str, Any]
    beside: bool  # others of the same thread may begin before it ends


@dataclass(frozen=True, slots=True, kw_only=True)
class Spans:
    """Of one process."""

    host: str
    pid: int
    spans: list[Span]


_kept: list[Span] | None = None


@contextmanager
def span(name: str, **about: Any) -> Iterator[None]:
    """Around what is to be seen; a decorator too."""
    start_s = time.time()
    try:
        yield
    finally:
        keep(name, start_s, **about)


def keep(name: str, start_s: float, *, beside: bool = False, **about: Any) -> None:
    """What began then and ends now."""
    if _kept is not None:
        thread = threading.current_thread().name
        _kept.append(Span(name=name, start_s=start_s, end_s=time.time(), thread=thread, about=about, beside=beside))


def take(*, go_on: bool) -> Spans:
    """What was kept since the last call; from now on all or nothing is."""
    global _kept
    taken, _kept = _kept or [], [] if go_on else None
    return Spans(host=socket.gethostname(), pid=os.getpid(), spans=taken)


T = TypeVar("T")


class Clock:
    """Laps in seconds; each ends where the next begins, so that they add up to the step. A name can have several."""

    def __init__(self) -> None:
        self.times: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.times[name] = self.times.get(name, 0.0) + now - self._last
        self._last = now

    def lap_at_end(self, name: str, items: Iterable[T]) -> Iterator[T]:
        """Passes `items` on, and ends the lap after the last one."""
        yield from items
        self.lap(name)
