"""Questions read before they are asked for: engines would idle while images are drawn, decoded and screened."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from othink_ray.types import Prompt


class ReadAhead:
    """Reads by position, as `read` does, in a thread of its own, which is always so many rows ahead.

    One thread, in order: what reads need not be safe for several. A failure is raised when its row is asked for.
    """

    def __init__(self, read: Callable[[int], Prompt], rows: int) -> None:
        self._read, self._rows = read, rows
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="questions")
        self._coming: dict[int, Future[Prompt]] = {}

    def __call__(self, position: int) -> Prompt:
        for row in range(position, position + self._rows + 1):
            if row not in self._coming:
                self._coming[row] = self._thread.submit(self._read, row)
        self._coming.pop(position - 1, None)
        return self._coming[position].result()

    def read(self, position: int) -> list[Prompt]:
        """Of the rows from here on the good ones, up to the first that is not there yet."""
        prompts = []
        for row in range(position, position + self._rows):
            if row not in self._coming or not self._coming[row].done():
                break
            if self._coming[row].exception() is None:
                prompts.append(self._coming[row].result())
        return prompts

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
