"""Shares of right answers over several seeds as one value with its interval, and the difference of two such values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from othink_ray.core.intervals import mean_and_half, wilson


@dataclass(frozen=True, slots=True, kw_only=True)
class Value:
    """A mean over seeds; `lo` and `hi` bound it with 95 % confidence."""

    mean: float
    lo: float
    hi: float
    seeds: tuple[int, ...]
    values: tuple[float, ...]  # one a seed
    questions: int  # the same ones for every seed

    @property
    def of_questions(self) -> tuple[float, float]:
        """The interval for having asked these questions and no others; more seeds do not narrow it."""
        return wilson(self.mean * self.questions, self.questions)


def value(shares: Mapping[int, float], questions: int) -> Value | None:
    """Of the shares by seed. The interval covers both chances: which seeds were run, and which questions were asked."""
    if not shares:
        return None
    seeds = tuple(sorted(shares))
    values = tuple(shares[seed] for seed in seeds)
    mean, half = mean_and_half(values) if len(values) > 1 else (values[0], 0.0)
    lo, hi = wilson(mean * questions, questions)
    return Value(
        mean=mean,
        lo=max(0.0, min(lo, mean - half)),
        hi=min(1.0, max(hi, mean + half)),
        seeds=seeds,
        values=values,
        questions=questions,
    )


def difference(a: Value, b: Value) -> tuple[float, float, float]:
    """a - b with its 95 % interval: the wider, on each side, of that over paired seeds and that over the questions."""
    gap, (a_lo, a_hi), (b_lo, b_hi) = a.mean - b.mean, a.of_questions, b.of_questions
    # Newcombe's interval for the difference of two shares (1998, method 10).
    low, high = math.hypot(a.mean - a_lo, b_hi - b.mean), math.hypot(a_hi - a.mean, b.mean - b_lo)
    both = [
        (x, y)
        for seed, x in zip(a.seeds, a.values, strict=True)
        for other, y in zip(b.seeds, b.values, strict=True)
        if seed == other
    ]
    if len(both) > 1:
        _, half = mean_and_half([x - y for x, y in both])
        low, high = max(low, half), max(high, half)
    return gap, gap - low, gap + high
