"""Read a trace and check the rules of the trace-event format."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Done:
    """One span of a trace, in microseconds."""

    process: str
    name: str
    start: int
    end: int
    attributes: dict[str, Any]

    def holds(self, other: Done) -> bool:
        return self.start <= other.start and other.end <= self.end

    def meets(self, other: Done) -> bool:
        return self.start < other.end and other.start < self.end


def spans_in(path: Path) -> list[Done]:
    """Return all spans of a valid trace, sorted by start."""
    events = json.loads(path.read_text())
    names = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    threads = {(event["pid"], event["tid"]) for event in events if event["name"] == "thread_name"}
    by_thread: dict[tuple[int, int], list[Done]] = defaultdict(list)
    begun: dict[int, dict[str, Any]] = {}
    found = []
    for event in events:
        assert event["ph"] in ("M", "X", "b", "e")
        if event["ph"] == "M":
            continue
        assert (event["pid"], event["tid"]) in threads
        process = names[event["pid"]].partition(" (")[0]
        if event["ph"] == "X":
            assert event["dur"] >= 0
            done = Done(process, event["name"], event["ts"], event["ts"] + event["dur"], event["args"])
            by_thread[event["pid"], event["tid"]].append(done)
        elif event["ph"] == "b":
            assert event["id"] not in begun
            begun[event["id"]] = event
            continue
        else:
            start = begun.pop(event["id"])
            assert all(start[key] == event[key] for key in ("name", "cat", "pid", "tid"))
            done = Done(process, event["name"], start["ts"], event["ts"], start["args"])
        found.append(done)
    assert begun == {}
    for spans in by_thread.values():
        assert list(crossing(spans)) == [], "complete events of one thread must nest"
    return sorted(found, key=lambda done: done.start)


def crossing(spans: list[Done]) -> Iterator[tuple[Done, Done]]:
    """Yield pairs of spans that overlap without nesting."""
    for index, first in enumerate(spans):
        for second in spans[:index]:
            if first.meets(second) and not (first.holds(second) or second.holds(first)):
                yield first, second
