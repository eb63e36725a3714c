"""An engine that is lost comes back with the policy that the others have: the run is what it would have been."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
import ray

from othink_ray.runtime.weight_sync import SharedMemoryPush
from othink_ray.runtime.worker_group import WorkerGroup
from othink_ray.types import Prompt, ScoredGroup
from othink_ray.weights.audit import AuditError

LATER = 100_000  # versions that no other test pushes


@pytest.fixture
def at_work(team: WorkerGroup) -> Iterator[WorkerGroup]:
    """With weights that the model's folder does not have."""
    team.rollout.sync_new_engines = team.pusher.sync_new_engines
    team.incidents.restarts = 0
    yield team
    team.push(LATER)


def kill_engine(team: WorkerGroup, how: int = signal.SIGKILL) -> None:
    [actor] = team.rollout.actors
    os.kill(ray.get(actor.ready.remote()), how)


def tokens(groups: list[ScoredGroup]) -> dict[str, list[list[int]]]:
    return {one.group.prompt.id: [c.token_ids.tolist() for c in one.group.completions] for one in groups}


def train(team: WorkerGroup, prompts: list[Prompt]) -> None:
    from tests.runtime.test_push import train_one_step

    train_one_step(team, prompts, 3)


def test_a_new_engine_answers_like_the_one_that_died(at_work: WorkerGroup, asked: list[Prompt]) -> None:
    train(at_work, asked)
    at_work.push(LATER + 1)
    expected = tokens(at_work.score(at_work.generate(asked, 5)))
    train(at_work, asked)  # the learner is ahead, as when both sides overlap
    kill_engine(at_work)
    again = at_work.score(at_work.generate(asked, 5))
    assert tokens(again) == expected
    assert {one.group.version for one in again} == {LATER + 1}
    assert at_work.incidents.take()["faults/rollout_restarts"] == 1


def test_an_engine_that_dies_before_a_push_gets_it_with_the_audit(at_work: WorkerGroup, asked: list[Prompt]) -> None:
    train(at_work, asked)
    kill_engine(at_work)
    audit = at_work.push(LATER + 2)
    assert audit.version == LATER + 2
    assert audit.gap_mean < 1e-4


def test_a_new_engine_that_did_not_get_the_weights_is_caught(at_work: WorkerGroup, asked: list[Prompt]) -> None:
    train(at_work, asked)
    at_work.push(LATER + 3)
    transport = at_work.pusher.transport
    assert isinstance(transport, SharedMemoryPush)
    transport.kept = []  # so that it keeps those of the folder
    kill_engine(at_work)
    with pytest.raises(AuditError, match="audit of weights version"):
        at_work.score(at_work.generate(asked, 5))
