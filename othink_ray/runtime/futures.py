"""Waiting for actors: results, time limits, and failures with the name of who failed and why."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import ray
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError, RayError, RayTaskError

from othink_ray.tracing import Spans, take

_DEATH_IS_KNOWN_S = 5.0


class WorkerFailed(RuntimeError):
    """A process of the run failed; the message names it and its cause."""


class ProcessLost(WorkerFailed):
    """A process died or hangs: another one in its place would do."""


class WorkersLost(ProcessLost):
    """`lost` says which of a call's actors, and what became of each."""

    def __init__(self, who: str, lost: Mapping[int, str]) -> None:
        self.lost = dict(lost)
        super().__init__("; ".join(f"{who} {what}" for what in self.lost.values()))


def gather(references: Sequence[Any], who: str, timeout_s: float) -> list[Any]:
    """All results, or the first failure as soon as there is one: a silent hang is the worst of errors."""
    places = {reference: place for place, reference in enumerate(references)}
    pending, until = list(places), time.monotonic() + timeout_s
    while pending:
        ready, pending = ray.wait(pending, timeout=max(0.0, until - time.monotonic()), fetch_local=False)
        if not ready:
            silent = f"gave no answer within {timeout_s:.0f} s"
            raise WorkersLost(who, {places[reference]: silent for reference in pending})
        for reference in ready:
            try:
                _raise_failure(reference, places[reference], who, until)
            except WorkersLost:
                raise
            except WorkerFailed:  # it may have failed because another one died under its hands
                _raise_deaths(pending, places, who)
                raise
    results: list[Any] = ray.get(list(references))
    return results


def _raise_deaths(pending: Sequence[Any], places: Mapping[Any, int], who: str) -> None:
    """Of those that have not ended; a death is known within seconds."""
    ready, _ = ray.wait(list(pending), num_returns=len(pending), timeout=_DEATH_IS_KNOWN_S) if pending else ([], [])
    for reference in ready:
        try:
            _raise_failure(reference, places[reference], who, time.monotonic())
        except WorkersLost:
            raise
        except WorkerFailed:
            continue


def _raise_failure(reference: Any, place: int, who: str, until: float) -> None:
    """Of a call that has ended."""
    try:
        ray.get(reference, timeout=max(1.0, until - time.monotonic()))
    except RayTaskError as error:
        raise _of_task(error, place, who) from error
    except (RayActorError, ObjectLostError) as error:
        if isinstance(error, RayActorError) and error.actor_init_failed:  # another one would fail alike
            raise WorkerFailed(f"{who} could not start: {_last_line(str(error))}\n{error}") from error
        raise WorkersLost(who, {place: f"died: {error}"}) from error
    except GetTimeoutError as error:
        raise WorkersLost(who, {place: "ended, but its result did not arrive"}) from error


def _last_line(text: str) -> str:
    """Of a traceback: what it came to."""
    return text.strip().rpartition("\n")[2]


def _of_task(error: RayTaskError, place: int, who: str) -> WorkerFailed:
    """A task that was given what a dead process should have made fails with that death as its cause."""
    cause = error.cause
    if isinstance(cause, RayActorError | ObjectLostError):
        return WorkersLost(who, {place: f"lost what it was given: {cause}"})
    return WorkerFailed(f"{who} failed: {cause!r}\n{error}")


class Streams:
    """What several actors give, one result after the other, as references; none of it is fetched.

    Each stream ends with a None of its own; where an error stands in its place, it broke off. After the last one `lost`
    says whose did; `came` is what each had given until then. Who dies behind its end leaves an error after the None:
    `sizes`, where known, tells that None from a result.
    """

    def __init__(
        self, streams: Mapping[int, Any], who: str, timeout_s: float, sizes: Mapping[int, int] | None = None
    ) -> None:
        self.streams, self.who, self.timeout_s, self.sizes = dict(streams), who, timeout_s, dict(sizes or {})
        self.came: dict[int, list[Any]] = {place: [] for place in streams}
        self.lost: dict[int, str] = {}

    def __iter__(self) -> Iterator[Any]:
        places = {stream: place for place, stream in self.streams.items()}
        held: dict[int, Any] = {}  # the last of each, as long as it may be its end
        while places:
            ready, _ = ray.wait(list(places), num_returns=1, timeout=self.timeout_s, fetch_local=False)
            if not ready:
                self.lost |= dict.fromkeys(places.values(), f"gave nothing within {self.timeout_s:.0f} s")
                break
            place = places[ready[0]]
            try:
                following = next(ready[0])
            except StopIteration:
                del places[ready[0]]
                self._end(held.pop(place), place)
                continue
            if place in held:
                yield from self._result(held[place], place)
            held[place] = following
        for place, reference in held.items():  # of those that hang: what they gave is sound
            yield from self._result(reference, place)

    def _result(self, reference: Any, place: int) -> Iterator[Any]:
        """Nothing, where it has given all before."""
        if len(self.came[place]) != self.sizes.get(place):
            self.came[place].append(reference)
            yield reference

    def _end(self, last: Any, place: int) -> None:
        try:
            _raise_failure(last, place, self.who, time.monotonic() + self.timeout_s)
        except WorkersLost as error:
            self.lost |= error.lost


_ASKED_S = 5.0


class TraceRecorder:
    """What every actor of a run can be asked."""

    concurrency_groups: ClassVar[Mapping[str, int]] = {}
    """Threads for methods that run beside the others, by the name of their group."""

    def spans(self, go_on: bool) -> Spans:
        return take(go_on=go_on)


def collect_traces(actors: Mapping[str, Any], *, go_on: bool) -> dict[str, Spans]:
    """By the same names; one that died or hangs is left out: who needs it next will find out."""
    calls = {name: actor.spans.remote(go_on) for name, actor in actors.items()}
    if calls:
        ray.wait(list(calls.values()), num_returns=len(calls), timeout=_ASKED_S)
    found = {}
    for name, call in calls.items():
        try:
            found[name] = ray.get(call, timeout=0)
        except RayError:
            continue
    return found
