"""A Chrome trace (trace.json) of a run's first steps, with the spans of the driver and of each of its processes.

Open it in ui.perfetto.dev or chrome://tracing. Format: https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from othink_ray.tracing import Span, Spans, keep, span, take

_END = "\n]\n"


class Processes(Protocol):
    """The processes of a run, whose spans the trace collects."""

    def spans(self, *, go_on: bool) -> Mapping[str, Spans]:
        """Return the spans of each process since the last call, by process name; `go_on`: keep recording."""
        ...


class FinishedStep(Protocol):
    """Record of a finished step of any training loop."""

    @property
    def step(self) -> int: ...


class LoopCallbacks(Protocol):
    """Callbacks of any training loop."""

    def on_start(self, step: int) -> None: ...

    def on_step(self, record: Any) -> None: ...


class Timeline:
    """Wraps a run's callbacks and traces its first `steps` steps; trace.json is valid JSON after every step.

    After `steps` steps tracing stops, so that neither its cost nor the file grows further.
    """

    def __init__(self, path: Path, processes: Processes, callbacks: LoopCallbacks, *, steps: int) -> None:
        self.path, self.processes, self.callbacks, self.steps_left = path, processes, callbacks, steps
        self.trace: Trace | None = None

    def __enter__(self) -> Self:
        self.path.unlink(missing_ok=True)  # left by an earlier start
        if self.steps_left:
            self.trace = Trace(self.path)
            self._take(go_on=True)
        return self

    def on_start(self, step: int) -> None:
        self.callbacks.on_start(step)
        self.step_start_s = time.time()

    def on_step(self, record: FinishedStep) -> None:
        keep("step", self.step_start_s, step=record.step)
        with span("callbacks", step=record.step):
            self.callbacks.on_step(record)
        self.steps_left -= 1
        self._take(go_on=self.steps_left > 0)
        self.step_start_s = time.time()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._take(go_on=False)
        elif self.trace is not None:  # the other processes may be dead, or too busy to answer before the run ends
            self._write(self.trace, {"driver": take(go_on=False)})

    def _take(self, *, go_on: bool) -> None:
        if self.trace is None:
            return
        written = self._write(self.trace, self._spans(go_on=go_on))
        if go_on and not written:
            self._spans(go_on=False)  # stop recording in all processes
        if not (go_on and written):
            self.trace = None

    @staticmethod
    def _write(trace: Trace, spans_by_process: Mapping[str, Spans]) -> bool:
        """Return whether the spans could be written; on a full disk tracing stops and the run continues."""
        for name, spans in spans_by_process.items():
            trace.add(name, spans)
        try:
            trace.flush()
        except OSError:
            return False
        return True

    def _spans(self, *, go_on: bool) -> dict[str, Spans]:
        return {"driver": take(go_on=go_on), **self.processes.spans(go_on=go_on)}


class Trace:
    """The trace file, a JSON array of events in the trace-event format."""

    def __init__(self, path: Path) -> None:
        self._path, self._end = path, 0  # file offset of the next events
        self._origin_s = time.time()
        self._threads: dict[str, dict[str, int]] = {}  # process name -> thread name -> number
        self._ids = count(1)  # of spans that may overlap others of their thread
        self._events: list[dict[str, Any]] = []

    def add(self, process: str, spans: Spans) -> None:
        pid = list(self._threads).index(process) + 1 if process in self._threads else self._register(process, spans)
        for item in spans.spans:
            self._events += self._events_of(item, pid, self._thread(process, pid, item.thread))

    def _register(self, process: str, spans: Spans) -> int:
        self._threads[process] = {}
        pid = len(self._threads)  # a number of our own: two hosts may use the same pid
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
        if not item.beside:
            return [event | {"ph": "X", "ts": start, "dur": end - start, "args": dict(item.about)}]
        event["id"] = next(self._ids)
        return [event | {"ph": "b", "ts": start, "args": dict(item.about)}, event | {"ph": "e", "ts": end}]

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
