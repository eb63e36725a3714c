"""Means over seeds, their intervals, and differences."""

from __future__ import annotations

import pytest

from othink_ray.core.intervals import mean_and_half, wilson
from othink_ray.study.results import Value, difference, value


def of(*shares: float, questions: int = 100, first_seed: int = 0) -> Value:
    found = value({first_seed + place: share for place, share in enumerate(shares)}, questions)
    assert found is not None
    return found


def test_one_seed_has_the_interval_of_its_questions_and_none_is_none() -> None:
    assert (of(0.5).lo, of(0.5).hi) == wilson(50, 100)
    assert value({}, 0) is None


def test_seeds_that_differ_widen_the_interval_and_seeds_that_agree_do_not_narrow_it() -> None:
    mean, half = mean_and_half([0.3, 0.5, 0.7])
    assert (of(0.3, 0.5, 0.7).lo, of(0.3, 0.5, 0.7).hi) == (max(0.0, mean - half), min(1.0, mean + half))
    assert (of(0.5, 0.5, 0.5).lo, of(0.5, 0.5, 0.5).hi) == wilson(50, 100)


def test_an_interval_never_leaves_zero_to_one() -> None:
    assert (of(0.0, 0.9).lo, of(0.1, 1.0).hi) == (0.0, 1.0)


def test_single_seeds_are_compared_by_newcombes_interval() -> None:
    """Newcombe 1998, table II, method 10: 56/70 against 48/80 is 0.2, from 0.0524 to 0.3339."""
    assert difference(of(56 / 70, questions=70), of(48 / 80, questions=80)) == pytest.approx(
        (0.2, 0.0524, 0.3339), abs=1e-4
    )


def test_saturated_seeds_settle_nothing_by_one_question() -> None:
    gap, low, _ = difference(of(0.5, 0.5, 0.5, questions=64), of(31 / 64, 31 / 64, 31 / 64, questions=64))
    assert gap == pytest.approx(1 / 64) and low < 0


def test_seeds_are_compared_in_pairs_of_the_same_seed() -> None:
    a, b = of(0.5, 0.6, 0.7, questions=10**6), of(0.4, 0.5, 0.6, questions=10**6)
    _, low, high = difference(a, b)
    assert high - low < 0.01  # every pair differs by 0.1, however wide the seeds are spread
    later = of(0.6, 0.7, 0.1, questions=10**6, first_seed=1)  # seed 3 has no pair
    _, low, high = difference(a, later)
    assert high - low < 0.01


def test_pairs_that_disagree_widen_the_interval() -> None:
    a, b = of(0.5, 0.6, 0.7, questions=10**6), of(0.7, 0.5, 0.3, questions=10**6)
    _, low, high = difference(a, b)
    assert low < 0 < high
