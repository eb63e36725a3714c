"""Errors of calls that fail, over a fake Ray."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from othink_ray.runtime import futures
from othink_ray.runtime.futures import WorkerFailed, WorkersLost, gather


def ray_of(outcomes: Mapping[str, Any]) -> SimpleNamespace:
    """Fake Ray: calls with an outcome are ready, as many as a wait asks for; all others stay pending."""

    def wait(
        pending: Sequence[str], *, num_returns: int = 1, timeout: float, fetch_local: bool = True
    ) -> tuple[Sequence[str], Sequence[str]]:
        assert timeout > 0
        ready = [call for call in pending if call in outcomes][:num_returns]
        return ready, [call for call in pending if call not in ready]

    def get(call: Any, timeout: float | None = None) -> Any:
        if isinstance(call, list):
            return [get(each) for each in call]
        if isinstance(outcomes[call], Exception):
            raise outcomes[call]
        return outcomes[call]

    return SimpleNamespace(wait=wait, get=get)


def task_error() -> RayTaskError:
    return RayTaskError("work", "line 1", ValueError("no such prompt"))


def test_results_come_in_the_order_of_the_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(futures, "ray", ray_of({"a": 1, "b": 2}))
    assert gather(["b", "a"], "an actor", 5) == [2, 1]


def test_a_call_without_a_result_in_time_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(futures, "ray", ray_of({"b": 2}))
    with pytest.raises(WorkersLost, match="an actor did not return within 5 s; an actor did not return") as raised:
        gather(["a", "b", "c"], "an actor", 5)
    assert list(raised.value.lost) == [0, 2]


def test_a_failure_is_named_where_no_actor_died(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(futures, "ray", ray_of({"a": task_error(), "b": 2, "c": task_error()}))
    with pytest.raises(WorkerFailed, match=r"^an actor failed: ValueError\('no such prompt'\)") as raised:
        gather(["a", "b", "c"], "an actor", 5)
    assert not isinstance(raised.value, WorkersLost)


def test_a_death_behind_a_failure_is_its_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(futures, "ray", ray_of({"a": task_error(), "b": task_error(), "c": RayActorError()}))
    with pytest.raises(WorkersLost, match=r"^an actor died") as raised:
        gather(["a", "b", "c"], "an actor", 5)
    assert list(raised.value.lost) == [2]


def test_a_result_that_cannot_be_fetched_is_a_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(futures, "ray", ray_of({"a": 1, "b": GetTimeoutError()}))
    with pytest.raises(WorkersLost) as raised:
        gather(["a", "b"], "an actor", 5)
    assert raised.value.lost == {1: "finished, but its result could not be fetched"}
