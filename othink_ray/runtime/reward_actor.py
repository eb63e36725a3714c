"""Ray actor that grades, in a process that can be killed; imports no torch, so that it restarts within a second."""

from __future__ import annotations

import resource

import psutil

from othink_ray.config.schema import RewardConfig
from othink_ray.rewards.base import score_group
from othink_ray.rewards.grader import Grader
from othink_ray.rewards.registry import CustomReward, weighted_rewards
from othink_ray.runtime.futures import TraceRecorder
from othink_ray.tracing import span
from othink_ray.types import Group, ScoredGroup


class RewardActor(TraceRecorder):
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
    """Let Python raise MemoryError beyond `extra_mb` more than is in use; Ray's shared memory does not count."""
    limit = psutil.Process().memory_full_info().data + extra_mb * 2**20
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
