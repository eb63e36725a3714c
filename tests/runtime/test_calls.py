"""What is said of calls that fail, with Ray's part played by a few lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from othink_ray.runtime import futures
from othink_ray.runtime.futures import WorkerFailed, WorkersLost, gather


def ray_of(outcomes: Mapping[str, Any]) -> SimpleNamespace:
    """Of the pending calls that have an outcome the first ends at each wait for one, and all at a wait for all."""

    def wait(
        pending: Sequence[str], *, num_returns: int = 1, timeout: float, fetch_local: bool = True
    ) -> tuple[Sequence[str], Sequence[str]]:
        assert timeout > 0
        ready = [one for one in pending if one in outcomes][:num_returns]
        return ready, [one for one in pending if one not in ready]

    def get(asked: Any, timeout: float | None = None) -> Any:
        if isinstance(asked, list):
            return [get(one) for one in asked]
        if isinstance(outcomes[asked], Exception):
            raise outcomes[asked]
        return outcomes[asked]

    return SimpleNamespace(wait=wait, get=get)


def task_error() -> RayTaskError:
    return RayTaskError("work", "line 1", ValueError("no such prompt"))


def test_results_come_in_the_order_of_the_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(futures, "ray", ray_of({"a": 1, "b": 2}))
    assert gather(["b", "a"], "an actor", 5) == [2, 1]


def test_who_gives_nothing_in_its_time_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(futures, "ray", ray_of({"b": 2}))
    with pytest.raises(WorkersLost, match="an actor gave no answer within 5 s; an actor gave no answer") as raised:
        gather(["a", "b", "c"], "an actor", 5)
    assert list(raised.value.lost) == [0, 2]


def test_a_failure_is_named_where_nobody_died(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(futures, "ray", ray_of({"a": task_error(), "b": 2, "c": task_error()}))
    with pytest.raises(WorkerFailed, match=r"^an actor failed: ValueError\('no such prompt'\)") as raised:
        gather(["a", "b", "c"], "an actor", 5)
    assert not isinstance(raised.value, WorkersLost)


def test_a_death_behind_a_failure_is_its_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(futures, "ray", ray_of({"a": task_error(), "b": task_error(), "c": RayActorError()}))
    with pytest.raises(WorkersLost, match=r"^an actor died") as raised:
        gather(["a", "b", "c"], "an actor", 5)
    assert list(raised.value.lost) == [2]


def test_a_result_that_does_not_arrive_is_a_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(futures, "ray", ray_of({"a": 1, "b": GetTimeoutError()}))
    with pytest.raises(WorkersLost) as raised:
        gather(["a", "b"], "an actor", 5)
    assert raised.value.lost == {1: "ended, but its result did not arrive"}
