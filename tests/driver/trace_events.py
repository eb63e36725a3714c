"""Reading a trace, by the rules of the trace-event format."""

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
    about: dict[str, Any]

    def holds(self, other: Done) -> bool:
        return self.start <= other.start and other.end <= self.end

    def meets(self, other: Done) -> bool:
        return self.start < other.end and other.start < self.end


def spans_in(path: Path) -> list[Done]:
    """All spans of a sound trace, in the order of their starts."""
    events = json.loads(path.read_text())
    names = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    rows = {(event["pid"], event["tid"]) for event in events if event["name"] == "thread_name"}
    own: dict[tuple[int, int], list[Done]] = defaultdict(list)
    begun: dict[int, dict[str, Any]] = {}
    found = []
    for event in events:
        assert event["ph"] in ("M", "X", "b", "e")
        if event["ph"] == "M":
            continue
        assert (event["pid"], event["tid"]) in rows
        process = names[event["pid"]].partition(" (")[0]
        if event["ph"] == "X":
            assert event["dur"] >= 0
            one = Done(process, event["name"], event["ts"], event["ts"] + event["dur"], event["args"])
            own[event["pid"], event["tid"]].append(one)
        elif event["ph"] == "b":
            assert event["id"] not in begun
            begun[event["id"]] = event
            continue
        else:
            start = begun.pop(event["id"])
            assert all(start[key] == event[key] for key in ("name", "cat", "pid", "tid"))
            one = Done(process, event["name"], start["ts"], event["ts"], start["args"])
        found.append(one)
    assert begun == {}
    for row in own.values():
        assert list(crossing(row)) == [], "complete events of one thread must nest"
    return sorted(found, key=lambda one: one.start)


def crossing(row: list[Done]) -> Iterator[tuple[Done, Done]]:
    for place, one in enumerate(row):
        for other in row[:place]:
            if one.meets(other) and not (one.holds(other) or other.holds(one)):
                yield one, other
