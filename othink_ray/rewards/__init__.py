"""Grading: from (completion text, true answer) to a number: `accuracy` and `format_reward` purely, `Grader` fully."""

from __future__ import annotations

from othink_ray.rewards.grade import accuracy
from othink_ray.rewards.grader import Grader
from othink_ray.rewards.layout import format_reward
from othink_ray.rewards.scorer import REWARDS, score_group

__all__ = ["REWARDS", "Grader", "accuracy", "format_reward", "score_group"]
