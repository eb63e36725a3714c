"""Waiting for actor calls: results in order, streams, time limits, and failures that name the actor and the cause."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import ray
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError, RayError, RayTaskError

from othink_ray.tracing import Spans, take_spans

_DEATH_DETECTION_S = 5.0
_TRACE_TIMEOUT_S = 5.0


class WorkerFailed(RuntimeError):
    """A process of the run failed; the message names it and its cause."""


class ProcessLost(WorkerFailed):
    """A process died or hangs; a restart may recover from it."""


class WorkersLost(ProcessLost):
    """Actors of one call died or hang; `lost` maps the index of each to what happened."""

    def __init__(self, name: str, lost: Mapping[int, str]) -> None:
        self.lost = dict(lost)
        super().__init__("; ".join(f"{name} {reason}" for reason in self.lost.values()))


def gather(references: Sequence[Any], name: str, timeout_s: float) -> list[Any]:
    """Return all results in order, or raise the first failure as soon as there is one.

    A call that takes longer than `timeout_s` is such a failure: its actor counts as lost.
    """
    indices = {reference: index for index, reference in enumerate(references)}
    pending, until = list(indices), time.monotonic() + timeout_s
    while pending:
        ready, pending = ray.wait(pending, timeout=max(0.0, until - time.monotonic()), fetch_local=False)
        if not ready:
            silent = f"did not return within {timeout_s:.0f} s"
            raise WorkersLost(name, {indices[reference]: silent for reference in pending})
        for reference in ready:
            try:
                _raise_failure(reference, indices[reference], name, until)
            except WorkersLost:
                raise
            except WorkerFailed:  # possibly the consequence of another actor's death, which then is the cause to name
                _raise_deaths(pending, indices, name)
                raise
    results: list[Any] = ray.get(list(references))
    return results


def _raise_deaths(pending: Sequence[Any], indices: Mapping[Any, int], name: str) -> None:
    """Raise WorkersLost if a pending call's actor died; Ray reports a death within seconds."""
    ready, _ = ray.wait(list(pending), num_returns=len(pending), timeout=_DEATH_DETECTION_S) if pending else ([], [])
    for reference in ready:
        try:
            _raise_failure(reference, indices[reference], name, time.monotonic())
        except WorkersLost:
            raise
        except WorkerFailed:
            continue


def _raise_failure(reference: Any, index: int, name: str, until: float) -> None:
    """Raise the failure of a finished call, if it has one."""
    try:
        ray.get(reference, timeout=max(1.0, until - time.monotonic()))
    except RayTaskError as error:
        raise _task_failure(error, index, name) from error
    except (RayActorError, ObjectLostError) as error:
        if isinstance(error, RayActorError) and error.actor_init_failed:  # a restart would fail in the same way
            raise WorkerFailed(f"{name} could not start: {_last_line(str(error))}\n{error}") from error
        raise WorkersLost(name, {index: f"died: {error}"}) from error
    except GetTimeoutError as error:
        raise WorkersLost(name, {index: "finished, but its result could not be fetched"}) from error


def _last_line(text: str) -> str:
    """Return the last line of a traceback: the exception."""
    return text.strip().rpartition("\n")[2]


def _task_failure(error: RayTaskError, index: int, name: str) -> WorkerFailed:
    """Return WorkersLost where an argument of the task was lost with the process that made it, else WorkerFailed."""
    cause = error.cause
    if isinstance(cause, RayActorError | ObjectLostError):
        return WorkersLost(name, {index: f"lost an argument: {cause}"})
    return WorkerFailed(f"{name} failed: {cause!r}\n{error}")


class Streams:
    """Iterates over the results of several streaming calls as object references, in order of arrival.

    Each stream ends with a None, its end marker; an error in its place means that the stream broke off. After the last
    result, `lost` maps the index of each broken stream to the reason, and `received` holds what each index yielded.
    An actor that dies after its end marker adds an error behind the None: with `sizes`, the number of results by index,
    that error is not taken for a result.
    """

    def __init__(
        self, streams: Mapping[int, Any], name: str, timeout_s: float, sizes: Mapping[int, int] | None = None
    ) -> None:
        self.streams, self.name, self.timeout_s, self.sizes = dict(streams), name, timeout_s, dict(sizes or {})
        self.received: dict[int, list[Any]] = {index: [] for index in streams}
        self.lost: dict[int, str] = {}

    def __iter__(self) -> Iterator[Any]:
        indices = {stream: index for index, stream in self.streams.items()}
        held: dict[int, Any] = {}  # the latest reference of each stream, which may be its end marker
        while indices:
            ready, _ = ray.wait(list(indices), num_returns=1, timeout=self.timeout_s, fetch_local=False)
            if not ready:
                self.lost |= dict.fromkeys(indices.values(), f"yielded nothing within {self.timeout_s:.0f} s")
                break
            index = indices[ready[0]]
            try:
                following = next(ready[0])
            except StopIteration:
                del indices[ready[0]]
                self._end(held.pop(index), index)
                continue
            if index in held:
                yield from self._result(held[index], index)
            held[index] = following
        for index, reference in held.items():  # streams that hang: their latest result is valid
            yield from self._result(reference, index)

    def _result(self, reference: Any, index: int) -> Iterator[Any]:
        """Yield the reference, unless the stream has yielded all its results before."""
        if len(self.received[index]) != self.sizes.get(index):
            self.received[index].append(reference)
            yield reference

    def _end(self, last: Any, index: int) -> None:
        try:
            _raise_failure(last, index, self.name, time.monotonic() + self.timeout_s)
        except WorkersLost as error:
            self.lost |= error.lost


class TracedActor:
    """Base class of every actor of a run: hands out its recorded trace spans."""

    concurrency_groups: ClassVar[Mapping[str, int]] = {}
    """Number of threads by concurrency group, for methods that run beside the others."""

    def spans(self, keep_recording: bool) -> Spans:
        return take_spans(keep_recording=keep_recording)


def collect_spans(actors: Mapping[str, Any], *, keep_recording: bool) -> dict[str, Spans]:
    """Return the trace spans of each actor by its name; dead or hanging actors are left out: their next call fails."""
    calls = {name: actor.spans.remote(keep_recording) for name, actor in actors.items()}
    if calls:
        ray.wait(list(calls.values()), num_returns=len(calls), timeout=_TRACE_TIMEOUT_S)
    found = {}
    for name, call in calls.items():
        try:
            found[name] = ray.get(call, timeout=0)
        except RayError:
            continue
    return found
