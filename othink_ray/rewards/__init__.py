"""Grading: from (completion text, true answer) to a number: `accuracy` and `format_reward` purely, `Grader` fully."""

from __future__ import annotations

from othink_ray.rewards.grader import REWARDS, Grader, accuracy, score_group
from othink_ray.rewards.parse import format_reward

__all__ = ["REWARDS", "Grader", "accuracy", "format_reward", "score_group"]
