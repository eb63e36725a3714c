"""Means over seeds, their intervals, and differences."""

from __future__ import annotations

import pytest

from othink_ray.core.intervals import mean_and_half, wilson
from othink_ray.study.results import SeedMean, difference, seed_mean


def mean_of(*fractions: float, questions: int = 100, first_seed: int = 0) -> SeedMean:
    mean = seed_mean(dict(enumerate(fractions, start=first_seed)), questions)
    assert mean is not None
    return mean


def test_one_seed_has_the_interval_of_its_questions() -> None:
    assert (mean_of(0.5).lo, mean_of(0.5).hi) == wilson(50, 100)
    assert seed_mean({}, 0) is None


def test_seed_spread_widens_but_never_narrows_the_interval() -> None:
    mean, half = mean_and_half([0.3, 0.5, 0.7])
    assert (mean_of(0.3, 0.5, 0.7).lo, mean_of(0.3, 0.5, 0.7).hi) == (max(0.0, mean - half), min(1.0, mean + half))
    assert (mean_of(0.5, 0.5, 0.5).lo, mean_of(0.5, 0.5, 0.5).hi) == wilson(50, 100)


def test_intervals_stay_within_0_and_1() -> None:
    assert (mean_of(0.0, 0.9).lo, mean_of(0.1, 1.0).hi) == (0.0, 1.0)


def test_single_seeds_are_compared_by_newcombes_interval() -> None:
    """Newcombe 1998, table II, method 10: 56/70 against 48/80 is 0.2, from 0.0524 to 0.3339."""
    assert difference(mean_of(56 / 70, questions=70), mean_of(48 / 80, questions=80)) == pytest.approx(
        (0.2, 0.0524, 0.3339), abs=1e-4
    )


def test_identical_seeds_settle_nothing_by_one_question() -> None:
    gap, low, _ = difference(mean_of(0.5, 0.5, 0.5, questions=64), mean_of(31 / 64, 31 / 64, 31 / 64, questions=64))
    assert gap == pytest.approx(1 / 64) and low < 0


def test_differences_pair_equal_seeds() -> None:
    a, b = mean_of(0.5, 0.6, 0.7, questions=10**6), mean_of(0.4, 0.5, 0.6, questions=10**6)
    _, low, high = difference(a, b)
    assert high - low < 0.01  # every pair differs by 0.1, however wide the seeds are spread
    later = mean_of(0.6, 0.7, 0.1, questions=10**6, first_seed=1)  # seed 3 has no pair
    _, low, high = difference(a, later)
    assert high - low < 0.01


def test_pairs_that_disagree_widen_the_interval() -> None:
    a, b = mean_of(0.5, 0.6, 0.7, questions=10**6), mean_of(0.7, 0.5, 0.3, questions=10**6)
    _, low, high = difference(a, b)
    assert low < 0 < high
