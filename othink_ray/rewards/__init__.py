"""Rewards of completions: `accuracy` and `format_reward` are pure functions; `Grader` adds the symbolic layer."""

from __future__ import annotations

from othink_ray.rewards.grader import REWARDS, Grader, accuracy, score_group
from othink_ray.rewards.parse import format_reward

__all__ = ["REWARDS", "Grader", "accuracy", "format_reward", "score_group"]
