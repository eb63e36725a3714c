"""What grades, in a process that can be killed; without torch, so that it is up again in a second."""

from __future__ import annotations

import resource

import psutil

from othink_ray.config.schema import RewardConfig
from othink_ray.rewards.custom import CustomReward
from othink_ray.rewards.grader import Grader, opened, score_group
from othink_ray.runtime.futures import TraceRecorder
from othink_ray.tracing import span
from othink_ray.types import Group, ScoredGroup


class RewardActor(TraceRecorder):
    """Scores one group a call."""

    def __init__(self, reward: RewardConfig, own: CustomReward | None) -> None:
        _limit_memory(reward.actor_memory_mb)
        self.reward, self.grader = reward, Grader(reward)
        self.own = {} if own is None else opened(own)

    def ready(self) -> None:
        """Answered when it is up: its time limit is for grading alone."""

    def score(self, group: Group) -> ScoredGroup:
        with span("score", prompt=group.prompt.id, answers=len(group.completions)):
            return score_group(group, self.reward, self.grader, self.own)


def _limit_memory(more_mb: int) -> None:
    """Beyond it Python raises MemoryError. Ray's store is mapped as shared memory, which does not count."""
    limit = psutil.Process().memory_full_info().data + more_mb * 2**20
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
