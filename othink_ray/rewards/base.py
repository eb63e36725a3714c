"""The `Reward` protocol, and the scores of a group: a weighted sum of rewards per answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Protocol

import numpy as np

from othink_ray.types import Completion, Group, Prompt, ScoredGroup


class Reward(Protocol):
    """Rates one completion of a prompt.

    The prompt has the messages, the encoded images, the true answer, the task and the id; the completion has the text
    and its tokens. Returns a finite float, higher for a better answer; built-in rewards stay within 0 to 1. The text is
    untrusted: it must never be executed. Raising an exception or returning a non-finite number masks this completion
    alone; only `GradingFailed` stops the run.
    """

    def __call__(self, prompt: Prompt, completion: Completion) -> float: ...


class GradingFailed(RuntimeError):
    """Raised when a reward cannot grade any answer, e.g. for a missing package or too little memory; stops the run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightedReward:
    """One term of the sum; `name` is its key in `ScoredGroup.parts` and its metric `reward/NAME`."""

    name: str
    weight: float
    reward: Reward


def score_group(group: Group, rewards: Sequence[WeightedReward], counts: Counter[str]) -> ScoredGroup:
    """Return the rewards (G,) of a group: the sum of weight * reward, and each reward unweighted in `parts`.

    An answer on which a reward raises or returns a non-finite value gets 0 and is marked invalid; the other answers of
    the group keep their rewards. `counts` is the grader's counter (`Grader.counts`): what this group adds to it becomes
    `graded`.
    """
    size = len(group.completions)
    parts = {term.name: np.zeros(size) for term in rewards}
    valid = np.ones(size, dtype=np.bool_)
    before = counts.copy()
    for index, completion in enumerate(group.completions):
        scores = _scores(group.prompt, completion, rewards)
        valid[index] = scores is not None
        for name, value in (scores or {}).items():
            parts[name][index] = value
    total = sum((term.weight * parts[term.name] for term in rewards), np.zeros(size))
    return ScoredGroup(group=group, rewards=total, parts=parts, valid=valid, graded=dict(counts - before))


def _scores(prompt: Prompt, completion: Completion, rewards: Sequence[WeightedReward]) -> dict[str, float] | None:
    try:
        scores = {term.name: float(term.reward(prompt, completion)) for term in rewards}
    except GradingFailed:
        raise
    # Rewards can be user code, and their input is untrusted model output: any failure masks only this answer.
    except Exception:
        return None
    return scores if all(map(isfinite, scores.values())) else None
