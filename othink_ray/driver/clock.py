"""Where the time of a step goes."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

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
