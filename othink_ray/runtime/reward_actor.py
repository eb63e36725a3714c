"""What grades, in a process that can be killed; without torch, so that it is up again in a second."""

from __future__ import annotations

from othink_ray.config.schema import RewardConfig
from othink_ray.rewards.grader import Grader
from othink_ray.rewards.scorer import score_group
from othink_ray.types import Group, ScoredGroup


class RewardActor:
    """Scores one group a call."""

    def __init__(self, reward: RewardConfig) -> None:
        self.reward, self.grader = reward, Grader(reward)

    def score(self, group: Group) -> ScoredGroup:
        return score_group(group, self.reward, self.grader)
