"""A replaced engine gets the policy of the others, so that the run is what it would have been."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
import ray

from othink_ray.runtime.weight_sync import SharedMemoryPush
from othink_ray.runtime.worker_group import WorkerGroup
from othink_ray.types import Prompt, ScoredGroup
from othink_ray.weights import AuditError

LATER = 100_000  # versions that no other test pushes


@pytest.fixture
def trained_workers(workers: WorkerGroup) -> Iterator[WorkerGroup]:
    """Yield workers with reset restarts; push afterwards, for the tests that follow."""
    workers.incidents.restarts = 0
    yield workers
    workers.push(LATER)


def kill_engine(workers: WorkerGroup, how: int = signal.SIGKILL) -> None:
    [actor] = workers.rollout.actors
    os.kill(ray.get(actor.ready.remote()), how)


def tokens(groups: list[ScoredGroup]) -> dict[str, list[list[int]]]:
    return {scored.group.prompt.id: [c.token_ids.tolist() for c in scored.group.completions] for scored in groups}


def train(workers: WorkerGroup, prompts: list[Prompt]) -> None:
    from tests.runtime.test_push import train_one_step

    train_one_step(workers, prompts, 3)


def test_a_replaced_engine_answers_like_the_lost_one(trained_workers: WorkerGroup, prompts: list[Prompt]) -> None:
    train(trained_workers, prompts)
    trained_workers.push(LATER + 1)
    expected = tokens(trained_workers.score(trained_workers.generate(prompts, 5)))
    train(trained_workers, prompts)  # the learner is ahead, as under overlap
    kill_engine(trained_workers)
    again = trained_workers.score(trained_workers.generate(prompts, 5))
    assert tokens(again) == expected
    assert {scored.group.version for scored in again} == {LATER + 1}
    assert trained_workers.incidents.take()["faults/rollout_restarts"] == 1


@pytest.mark.slow
def test_an_engine_lost_before_a_push_gets_it_with_the_audit(
    trained_workers: WorkerGroup, prompts: list[Prompt]
) -> None:
    train(trained_workers, prompts)
    kill_engine(trained_workers)
    audit = trained_workers.push(LATER + 2)
    assert audit.version == LATER + 2
    assert audit.gap_mean < 1e-4


@pytest.mark.slow
def test_a_new_engine_without_the_weights_is_caught(trained_workers: WorkerGroup, prompts: list[Prompt]) -> None:
    train(trained_workers, prompts)
    trained_workers.push(LATER + 3)
    transport = trained_workers.pusher.transport
    assert isinstance(transport, SharedMemoryPush)
    transport.kept = []  # so that the new engine keeps the weights of the folder
    kill_engine(trained_workers)
    with pytest.raises(AuditError, match="audit of weights version"):
        trained_workers.score(trained_workers.generate(prompts, 5))
