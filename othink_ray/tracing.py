"""Tracing: the spans that a process records, and the trace file with the spans of all processes of a run.

The file is a Chrome trace: open it in ui.perfetto.dev or chrome://tracing. Format:
https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

_END = "\n]\n"
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """One interval of work on one thread. Times are time.time(): spans of two hosts align as well as their clocks."""

    name: str
    start_s: float
    end_s: float
    thread: str
    attributes: Mapping[str, Any]  # shown with the span
    overlaps: bool  # may overlap other spans of its thread, instead of nesting in them


@dataclass(frozen=True, slots=True, kw_only=True)
class Spans:
    """The spans of one process."""

    host: str
    pid: int
    spans: list[Span]


_recorded: list[Span] | None = None  # None: recording is off


@contextmanager
def span(name: str, **attributes: Any) -> Iterator[None]:
    """Record the enclosed block as a span; works as a decorator too."""
    start_s = time.time()
    try:
        yield
    finally:
        record_span(name, start_s, **attributes)


def record_span(name: str, start_s: float, *, overlaps: bool = False, **attributes: Any) -> None:
    """Record a span that started at `start_s` and ends now; dropped unless recording is on."""
    if _recorded is not None:
        _recorded.append(
            Span(
                name=name,
                start_s=start_s,
                end_s=time.time(),
                thread=threading.current_thread().name,
                attributes=attributes,
                overlaps=overlaps,
            )
        )


def take_spans(*, keep_recording: bool) -> Spans:
    """Return the spans recorded since the last call, and turn recording on or off for what follows."""
    global _recorded
    taken, _recorded = _recorded or [], [] if keep_recording else None
    return Spans(host=socket.gethostname(), pid=os.getpid(), spans=taken)


class Clock:
    """Stopwatch whose laps, in seconds, each start where the previous one ended.

    So all laps add up to the time from creation to the last lap; laps of the same name are summed.
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


class TraceFile:
    """The trace file of a run, a JSON array of events; valid JSON after each `flush`."""

    def __init__(self, path: Path) -> None:
        self._path, self._end = path, 0  # file offset of the next events
        self._origin_s = time.time()
        self._threads: dict[str, dict[str, int]] = {}  # process name -> thread name -> number
        self._ids = count(1)  # of spans that overlap others of their thread
        self._events: list[dict[str, Any]] = []

    def add(self, process: str, spans: Spans) -> None:
        pid = list(self._threads).index(process) + 1 if process in self._threads else self._register(process, spans)
        for item in spans.spans:
            self._events += self._events_of(item, pid, self._thread(process, pid, item.thread))

    def _register(self, process: str, spans: Spans) -> int:
        self._threads[process] = {}
        pid = len(self._threads)  # not the process id: two hosts may use the same
        title = f"{process} ({spans.host}, pid {spans.pid})"
        self._name("process_name", pid, 0, name=title)
        self._name("process_sort_index", pid, 0, sort_index=pid)
        return pid

    def _thread(self, process: str, pid: int, thread: str) -> int:
        threads = self._threads[process]
        if thread not in threads:
            threads[thread] = len(threads) + 1
            self._name("thread_name", pid, threads[thread], name=thread)
        return threads[thread]

    def _name(self, event: str, pid: int, tid: int, **values: Any) -> None:
        self._events.append({"name": event, "ph": "M", "pid": pid, "tid": tid, "args": values})

    def _events_of(self, item: Span, pid: int, tid: int) -> list[dict[str, Any]]:
        event = {"name": item.name, "cat": "othink_ray", "pid": pid, "tid": tid}
        start, end = self._microseconds(item.start_s), self._microseconds(item.end_s)
        if not item.overlaps:
            return [event | {"ph": "X", "ts": start, "dur": end - start, "args": dict(item.attributes)}]
        event["id"] = next(self._ids)
        return [event | {"ph": "b", "ts": start, "args": dict(item.attributes)}, event | {"ph": "e", "ts": end}]

    def _microseconds(self, unix_s: float) -> int:
        return round(1e6 * (unix_s - self._origin_s))

    def flush(self) -> None:
        """Write the pending events and close the array; the next ones overwrite its closing bracket."""
        if not self._events:
            return
        text = ",\n".join(map(json.dumps, self._events))
        self._events.clear()
        with self._path.open("r+" if self._end else "w", encoding="utf-8") as file:
            file.seek(self._end)
            file.write((",\n" if self._end else "[\n") + text + _END)
            self._end = file.tell() - len(_END)
