"""95% intervals against published values and by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest

from othink_ray.core.intervals import mean_and_half, wilson


@pytest.mark.parametrize(
    ("correct", "trials", "low", "high"), [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (127, 256, 0.4353, 0.5570)]
)
def test_wilson_intervals_equal_published_values(correct: int, trials: int, low: float, high: float) -> None:
    assert wilson(correct, trials) == pytest.approx((low, high), abs=1e-3)


def test_the_interval_of_three_values_uses_students_t() -> None:
    mean, half = mean_and_half([0.5, 0.6, 0.7])
    assert mean == pytest.approx(0.6)
    assert half == pytest.approx(4.303 * 0.1 / math.sqrt(3), abs=1e-4)


def test_intervals_of_0_and_1_stay_between_0_and_1() -> None:
    for trials in range(1, 300):
        (least, low), (high, most) = wilson(0, trials), wilson(trials, trials)
        assert 0 <= least < low and high < most <= 1


def inside(quantile: float, freedom: int) -> float:
    """Return the probability that Student's t lies between -quantile and quantile."""
    at = np.linspace(0, quantile, 20_001)
    scale = math.gamma((freedom + 1) / 2) / math.gamma(freedom / 2) / math.sqrt(freedom * math.pi)
    return float(2 * np.trapezoid(scale * (1 + at**2 / freedom) ** (-(freedom + 1) / 2), at))


@pytest.mark.parametrize("count", range(2, 34))
def test_the_half_width_is_a_t_quantile_of_the_standard_error(count: int) -> None:
    values = [2.0] * (count - 1) + [2.0 + count]
    mean, half = mean_and_half(values)
    assert mean == pytest.approx(3.0)
    quantile = half / math.sqrt(np.var(values, ddof=1) / count)
    if count <= 31:
        assert inside(quantile, count - 1) == pytest.approx(0.95, abs=5e-5)
    else:
        assert quantile == pytest.approx(1.96)


@pytest.mark.parametrize("count", [2, 3, 12, 40])
def test_the_interval_of_a_mean_has_95_percent_coverage(count: int) -> None:
    rng = np.random.default_rng(count)
    covered = 0
    for values in rng.normal(0.5, 0.05, (3000, count)):
        mean, half = mean_and_half(values.tolist())
        covered += abs(mean - 0.5) <= half
    assert 0.935 < covered / 3000 < 0.965
