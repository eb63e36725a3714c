"""95% confidence intervals: Wilson's for a proportion of questions, Student's t for a mean over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence

# Two-sided 95% quantiles of Student's t for 1 to 30 degrees of freedom; beyond 30 the normal quantile is close enough.
_T95 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
_NORMAL95 = 1.960


def wilson(successes: float, trials: int, z: float = _NORMAL95) -> tuple[float, float]:
    """Return the Wilson score interval of a proportion; valid at 0, at 1 and for few trials."""
    share = successes / trials
    scale = 1 + z**2 / trials
    center = (share + z**2 / (2 * trials)) / scale
    half = z * math.sqrt(share * (1 - share) / trials + z**2 / (4 * trials**2)) / scale
    return max(0.0, center - half), min(1.0, center + half)


def mean_and_half(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean of at least two values and the half-width of its t interval."""
    count = len(values)
    mean = sum(values) / count
    variance = sum((value - mean) ** 2 for value in values) / (count - 1)
    quantile = _T95[count - 2] if count - 2 < len(_T95) else _NORMAL95
    return mean, quantile * math.sqrt(variance / count)
