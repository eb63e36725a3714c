"""Rewards of completions: `accuracy` and `format_reward` are pure functions; `Grader` adds math-verify."""

from __future__ import annotations

from othink_ray.rewards.base import Reward, WeightedReward, score_group
from othink_ray.rewards.grader import Grader, accuracy
from othink_ray.rewards.parse import format_reward
from othink_ray.rewards.registry import REWARDS, weighted_rewards

__all__ = [
    "REWARDS",
    "Grader",
    "Reward",
    "WeightedReward",
    "accuracy",
    "format_reward",
    "score_group",
    "weighted_rewards",
]
