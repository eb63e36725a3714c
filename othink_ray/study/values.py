"""Numbers of several seeds as one value with its interval, and the difference of two such values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

# Two-sided 95 % quantiles of Student's t, by degrees of freedom; above ten the normal one is near enough.
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
NORMAL95 = 1.960


@dataclass(frozen=True, slots=True, kw_only=True)
class Value:
    """A mean over seeds; `lo` and `hi` bound it with 95 % confidence."""

    mean: float
    lo: float
    hi: float
    values: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Single:
    """One run's share of right answers with its own interval."""

    share: float
    lo: float
    hi: float


def value(runs: Sequence[Single]) -> Value | None:
    """A t interval over seeds; of one seed alone, the interval of its questions."""
    if not runs:
        return None
    if len(runs) == 1:
        [run] = runs
        return Value(mean=run.share, lo=run.lo, hi=run.hi, values=(run.share,))
    shares = tuple(run.share for run in runs)
    mean, half = mean_and_half(shares)
    return Value(mean=mean, lo=max(0.0, mean - half), hi=min(1.0, mean + half), values=shares)


def mean_and_half(values: Sequence[float]) -> tuple[float, float]:
    """The mean of at least two values, and half the width of its 95 % t interval."""
    count = len(values)
    mean = sum(values) / count
    variance = sum((one - mean) ** 2 for one in values) / (count - 1)
    quantile = T95[count - 2] if count - 2 < len(T95) else NORMAL95
    return mean, quantile * math.sqrt(variance / count)


def difference(a: Value, b: Value) -> tuple[float, float, float]:
    """a - b with its 95 % interval: paired over the seeds, or, of one seed each, Newcombe's of two shares."""
    if len(a.values) == len(b.values) > 1:
        mean, half = mean_and_half([x - y for x, y in zip(a.values, b.values, strict=True)])
        return mean, mean - half, mean + half
    gap = a.mean - b.mean
    low = math.hypot(a.mean - a.lo, b.hi - b.mean)
    high = math.hypot(a.hi - a.mean, b.mean - b.lo)
    return gap, gap - low, gap + high
