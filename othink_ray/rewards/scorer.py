"""From a group of answers to its rewards (Eq. 1)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import isfinite
from types import MappingProxyType
from typing import TypeAlias

import numpy as np

from othink_ray.config.schema import RewardConfig
from othink_ray.rewards.grader import Grader
from othink_ray.rewards.layout import format_reward
from othink_ray.rewards.own import OwnReward
from othink_ray.rewards.symbolic import GradingFailed
from othink_ray.types import Group, ScoredGroup

Reward: TypeAlias = Callable[[str, str, Grader], float]  # of the completion's text, the true answer, the run's grader


def _accuracy(text: str, answer: str, grader: Grader) -> float:
    return grader.accuracy(text, answer)


def _format(text: str, answer: str, grader: Grader) -> float:
    return format_reward(text)


REWARDS: dict[str, Reward] = {
    "accuracy": _accuracy,
    "format": _format,
}


def score_group(
    group: Group, reward: RewardConfig, grader: Grader, own: Mapping[str, Reward] = MappingProxyType({})
) -> ScoredGroup:
    """accuracy + format_weight * format for each of the G answers, and what a reward of the user's own adds.

    An answer on which a reward function fails gets 0 and is marked invalid; the others of its group keep their rewards.
    """
    functions = {**REWARDS, **own}
    weights = {"accuracy": reward.accuracy_weight, "format": reward.format_weight}
    size = len(group.completions)
    parts = {name: np.zeros(size) for name in functions}
    valid = np.ones(size, dtype=np.bool_)
    before = grader.counts.copy()
    for row, completion in enumerate(group.completions):
        scores = _score(functions, completion.text, group.prompt.answer, grader)
        valid[row] = scores is not None
        for name, value in (scores or {}).items():
            parts[name][row] = value
    rewards = sum((weights.get(name, reward.own_weight) * part for name, part in parts.items()), np.zeros(size))
    return ScoredGroup(group=group, rewards=rewards, parts=parts, valid=valid, graded=dict(grader.counts - before))


def opened(own: OwnReward) -> dict[str, Reward]:
    """By its name, as the others are called."""
    function = own.function()
    return {own.name: lambda text, answer, grader: function(text, answer)}


def _score(functions: Mapping[str, Reward], text: str, answer: str, grader: Grader) -> dict[str, float] | None:
    try:
        scores = {name: float(function(text, answer, grader)) for name, function in functions.items()}
    except GradingFailed:  # no answer's fault: the run must stop and say so
        raise
    # A reward function may come from a user and meets whatever a model wrote: any failure is this answer's alone.
    except Exception:
        return None
    return scores if all(isfinite(value) for value in scores.values()) else None
