"""From a group of answers to its rewards (Eq. 1)."""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite

import numpy as np

from othink_ray.config.schema import RewardConfig
from othink_ray.rewards.grade import accuracy
from othink_ray.rewards.layout import format_reward
from othink_ray.types import Group, ScoredGroup


def _format(text: str, answer: str) -> float:
    return format_reward(text)


REWARDS: dict[str, Callable[[str, str], float]] = {
    "accuracy": accuracy,
    "format": _format,
}


def score_group(group: Group, reward: RewardConfig) -> ScoredGroup:
    """accuracy + format_weight * format for each of the G answers.

    An answer on which a reward function fails gets 0 and is marked invalid; the others of its group keep their rewards.
    """
    size = len(group.completions)
    parts = {name: np.zeros(size) for name in REWARDS}
    valid = np.ones(size, dtype=np.bool_)
    for row, completion in enumerate(group.completions):
        scores = _score(completion.text, group.prompt.answer)
        valid[row] = scores is not None
        for name, value in (scores or {}).items():
            parts[name][row] = value
    rewards = parts["accuracy"] + reward.format_weight * parts["format"]
    return ScoredGroup(group=group, rewards=rewards, parts=parts, valid=valid)


def _score(text: str, answer: str) -> dict[str, float] | None:
    try:
        scores = {name: float(function(text, answer)) for name, function in REWARDS.items()}
    # A reward function may come from a user and meets whatever a model wrote: any failure is this answer's alone.
    except Exception:
        return None
    return scores if all(isfinite(value) for value in scores.values()) else None
