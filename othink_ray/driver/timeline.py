"""A Chrome trace of a run's first steps: what the driver and each of its processes did, and when.

For ui.perfetto.dev and chrome://tracing. https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from othink_ray.driver.loop import Callbacks, Step, Workers
from othink_ray.tracing import Span, Spans, keep, span, take
from othink_ray.types import Audit, Pack, Prompt, ScoredGroup, UpdateStats

_END = "\n]\n"


class Processes(Protocol):
    def spans(self, *, go_on: bool) -> Mapping[str, Spans]:
        """What each process did since the last call, by its name; `go_on`: it notes what comes too."""
        ...


class Timeline:
    """Callbacks a run and passes on what it sees; trace.json is whole after every step, and is left alone after `steps`.

    So its cost ends there, and so does the file's growth.
    """

    def __init__(self, path: Path, processes: Processes, journal: Callbacks, *, steps: int) -> None:
        self.path, self.processes, self.journal, self.left = path, processes, journal, steps
        self.trace: Trace | None = None

    def __enter__(self) -> Self:
        self.path.unlink(missing_ok=True)  # of an earlier start
        if self.left:
            self.trace = Trace(self.path)
            self._take(go_on=True)
        return self

    def begin(self, step: int) -> None:
        self.journal.begin(step)
        self.began_s = time.time()

    def step(self, seen: Step) -> None:
        keep("step", self.began_s, step=seen.step)
        with span("journal", step=seen.step):
            self.journal.step(seen)
        self.left -= 1
        self._take(go_on=self.left > 0)
        self.began_s = time.time()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._take(go_on=False)
        elif self.trace is not None:  # the processes may be gone, or at work for longer than a run takes to end
            self._write(self.trace, {"driver": take(go_on=False)})

    def _take(self, *, go_on: bool) -> None:
        if self.trace is None:
            return
        written = self._write(self.trace, self._spans(go_on=go_on))
        if go_on and not written:
            self._spans(go_on=False)
        if not (go_on and written):
            self.trace = None

    @staticmethod
    def _write(trace: Trace, found: Mapping[str, Spans]) -> bool:
        """False where there is no room for it: the trace ends there, the run does not."""
        for name, spans in found.items():
            trace.add(name, spans)
        try:
            trace.flush()
        except OSError:
            return False
        return True

    def _spans(self, *, go_on: bool) -> dict[str, Spans]:
        return {"driver": take(go_on=go_on), **self.processes.spans(go_on=go_on)}


class Trace:
    """The file, in the trace-event format: an array of events."""

    def __init__(self, path: Path) -> None:
        self._path, self._end = path, 0  # where the next events go
        self._origin_s = time.time()
        self._rows: dict[str, dict[str, int]] = {}  # of each process its threads, numbered
        self._numbers = count(1)  # of what is beside something else
        self._events: list[dict[str, Any]] = []

    def add(self, process: str, spans: Spans) -> None:
        pid = list(self._rows).index(process) + 1 if process in self._rows else self._introduce(process, spans)
        for one in spans.spans:
            self._events += self._events_of(one, pid, self._thread(process, pid, one.thread))

    def _introduce(self, process: str, spans: Spans) -> int:
        self._rows[process] = {}
        pid = len(self._rows)  # its own could be another one's on another host
        title = f"{process} ({spans.host}, pid {spans.pid})"
        self._name("process_name", pid, 0, name=title)
        self._name("process_sort_index", pid, 0, sort_index=pid)
        return pid

    def _thread(self, process: str, pid: int, thread: str) -> int:
        threads = self._rows[process]
        if thread not in threads:
            threads[thread] = len(threads) + 1
            self._name("thread_name", pid, threads[thread], name=thread)
        return threads[thread]

    def _name(self, what: str, pid: int, tid: int, **values: Any) -> None:
        self._events.append({"name": what, "ph": "M", "pid": pid, "tid": tid, "args": values})

    def _events_of(self, one: Span, pid: int, tid: int) -> list[dict[str, Any]]:
        event = {"name": one.name, "cat": "othink_ray", "pid": pid, "tid": tid}
        start, end = self._microseconds(one.start_s), self._microseconds(one.end_s)
        if not one.beside:
            return [event | {"ph": "X", "ts": start, "dur": end - start, "args": dict(one.about)}]
        event["id"] = next(self._numbers)
        return [event | {"ph": "b", "ts": start, "args": dict(one.about)}, event | {"ph": "e", "ts": end}]

    def _microseconds(self, unix_s: float) -> int:
        return round(1e6 * (unix_s - self._origin_s))

    def flush(self) -> None:
        """The array is closed each time, and the next events are written over its end."""
        if not self._events:
            return
        text = ",\n".join(map(json.dumps, self._events))
        self._events.clear()
        with self._path.open("r+" if self._end else "w", encoding="utf-8") as file:
            file.seek(self._end)
            file.write((",\n" if self._end else "[\n") + text + _END)
            self._end = file.tell() - len(_END)


class TracedWorkers:
    """The four verbs as the driver sees them; `score` has `generate` in it, for it takes groups as they come."""

    def __init__(self, team: Workers) -> None:
        self.team = team

    def generate(self, prompts: Sequence[Prompt], step: int, sampling_round: int) -> Iterator[Any]:
        with span("generate", step=step, sampling_round=sampling_round, prompts=len(prompts)):
            yield from self.team.generate(prompts, step, sampling_round)

    def score(self, groups: Iterable[Any]) -> list[ScoredGroup]:
        with span("score"):
            return self.team.score(groups)

    def update(self, packs: Sequence[Pack], *, updates: int, beta: float, lr: float, stale: bool) -> UpdateStats:
        with span("update", rows=len(packs)):
            return self.team.update(packs, updates=updates, beta=beta, lr=lr, stale=stale)

    def prepare(self, packs: Sequence[Pack], *, updates: int, with_reference: bool) -> None:
        self.team.prepare(packs, updates=updates, with_reference=with_reference)

    def push(self, version: int) -> Audit:
        with span("push", version=version):
            return self.team.push(version)
