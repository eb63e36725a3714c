"""Reward actors, which grade in processes that can be killed, and their pool.

An actor that times out or dies is replaced, and the answer that caused it is masked. Nothing here imports torch, so
that an actor restarts within a second.
"""

from __future__ import annotations

import resource
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import psutil
import ray
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError, RayTaskError

from othink_ray.config.schema import RewardConfig
from othink_ray.rewards.base import score_group
from othink_ray.rewards.grader import Grader
from othink_ray.rewards.registry import CustomReward, read_custom_reward, weighted_rewards
from othink_ray.runtime.futures import TracedActor, WorkerFailed, gather
from othink_ray.runtime.monitoring import Incidents
from othink_ray.runtime.placement import Placement
from othink_ray.tracing import span
from othink_ray.types import Group, ScoredGroup

_NAME, _START_S = "a reward actor", 120.0


class RewardActor(TracedActor):
    """Scores one group per call."""

    def __init__(self, reward: RewardConfig, custom: CustomReward | None) -> None:
        _limit_memory(reward.actor_memory_mb)
        self.grader = Grader(reward)
        self.rewards = weighted_rewards(reward, self.grader, custom)

    def ready(self) -> None:
        """Return when the process is up, so that the time limit of `score` covers grading alone."""

    def score(self, group: Group) -> ScoredGroup:
        with span("score", prompt=group.prompt.id, answers=len(group.completions)):
            return score_group(group, self.rewards, self.grader.counts)


def _limit_memory(extra_mb: int) -> None:
    """Limit memory to `extra_mb` MiB more than now, without shared memory; the MemoryError beyond masks an answer."""
    limit = psutil.Process().memory_full_info().data + extra_mb * 2**20
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


class _Lost(Exception):
    """The actor returned no score: it died or hangs."""


@dataclass(slots=True)
class _Request:
    group: Any  # object reference
    index: int  # of the actor in the pool
    actor: Any  # that was called: the pool may hold its replacement by now
    score: Any  # object reference


class RewardPool:
    """Scores groups on its actors as they arrive."""

    def __init__(self, reward: RewardConfig, incidents: Incidents) -> None:
        self.reward, self.incidents = reward, incidents
        self.custom = read_custom_reward(reward.custom)
        self.actors = [self._start() for _ in range(reward.actors)]

    def _start(self) -> Any:
        return Placement.start_unreserved(RewardActor, self.reward, self.custom)

    def wait(self) -> None:
        gather([actor.ready.remote() for actor in self.actors], f"{_NAME} (loading)", _START_S)

    def score(self, groups: Iterable[Any]) -> list[ScoredGroup]:
        """Return the scored groups in the order of arrival; `groups` are object references."""
        requests = [self._submit(group, number % len(self.actors)) for number, group in enumerate(groups)]
        return [self._collect(request) for request in requests]

    def _submit(self, group: Any, index: int) -> _Request:
        actor = self.actors[index]
        return _Request(group=group, index=index, actor=actor, score=actor.score.remote(group))

    def _collect(self, request: _Request) -> ScoredGroup:
        try:
            return self._result(request)
        except _Lost:
            if self._replace(request):  # else it was only queued behind the request that lost the actor
                [group] = gather([request.group], "a rollout actor (handing over a group)", self.reward.timeout_s)
                return self._score_one_by_one(group, request.index)
            return self._collect(self._submit(request.group, request.index))

    def _result(self, request: _Request) -> ScoredGroup:
        try:
            scored: ScoredGroup = ray.get(request.score, timeout=self.reward.timeout_s)
            return scored
        except RayTaskError as error:
            raise WorkerFailed(f"scoring a group failed: {error.cause!r}\n{error}") from error
        except ObjectLostError as error:
            raise WorkerFailed(f"a group was lost before it was scored: {error}") from error
        except (GetTimeoutError, RayActorError) as error:
            raise _Lost from error

    def _replace(self, request: _Request) -> bool:
        """Kill and replace the actor of a request; return False if it was replaced before."""
        if self.actors[request.index] is not request.actor:
            return False
        ray.kill(request.actor)
        self.actors[request.index] = self._start()
        gather([self.actors[request.index].ready.remote()], f"{_NAME} (restarting)", _START_S)
        self.incidents.counts["reward_restarts"] += 1
        return True

    def _score_one_by_one(self, group: Group, index: int) -> ScoredGroup:
        """Score each answer alone, so that only an answer that breaks the actor is masked."""
        size = len(group.completions)
        rewards, valid = np.zeros(size), np.zeros(size, dtype=np.bool_)
        parts: dict[str, Any] = {}
        graded: dict[str, int] = {}
        for position, completion in enumerate(group.completions):
            request = self._submit(ray.put(replace(group, completions=(completion,))), index)
            try:
                alone = self._result(request)
            except _Lost:
                self._replace(request)
                continue
            rewards[position], valid[position] = alone.rewards[0], alone.valid[0]
            for name, part in alone.parts.items():
                parts.setdefault(name, np.zeros(size))[position] = part[0]
            for name, count in alone.graded.items():
                graded[name] = graded.get(name, 0) + count
        lost = int((~valid).sum())
        self.incidents.note(
            "masked_answers",
            f"masked {lost} of {size} answers to {group.prompt.id}: grading took longer than algo.reward.timeout_s = "
            f"{self.reward.timeout_s:g} or killed the reward actor",
            count=lost,
        )
        return ScoredGroup(group=group, rewards=rewards, parts=parts, valid=valid, graded=graded)
