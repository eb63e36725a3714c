"""Means over seeds, their intervals, and differences."""

from __future__ import annotations

import math

import numpy as np
import pytest

from othink_ray.driver.evaluate import wilson
from othink_ray.study.values import Single, Value, difference, value


def single(share: float, trials: int = 100) -> Single:
    lo, hi = wilson(share * trials, trials)
    return Single(share=share, lo=lo, hi=hi)


def test_three_seeds_have_a_t_interval() -> None:
    found = value([single(0.5), single(0.6), single(0.7)])
    assert found is not None
    assert found.mean == pytest.approx(0.6)
    assert found.hi - found.mean == pytest.approx(4.303 * 0.1 / math.sqrt(3), abs=1e-4)


def test_one_seed_keeps_the_interval_of_its_questions_and_none_is_none() -> None:
    found = value([single(0.5)])
    assert found is not None and (found.lo, found.hi) == wilson(50, 100)
    assert value([]) is None


def test_seeds_are_compared_in_pairs() -> None:
    a, b = value([single(s) for s in (0.5, 0.6, 0.7)]), value([single(s) for s in (0.4, 0.51, 0.59)])
    assert a is not None and b is not None
    gap, low, high = difference(a, b)
    assert gap == pytest.approx(0.1) and 0 < low < gap < high  # though the two intervals overlap widely
    assert a.lo < b.hi


def test_an_interval_of_seeds_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(2000):
        found = value([Single(share=share, lo=0, hi=1) for share in rng.normal(0.5, 0.05, 3)])
        assert found is not None
        covered += found.lo <= 0.5 <= found.hi
    assert 0.935 < covered / 2000 < 0.965


def test_single_seeds_are_compared_by_newcombes_interval() -> None:
    """Newcombe 1998, table II, method 10: 56/70 against 48/80 is 0.2, from 0.0524 to 0.3339."""
    first, second = wilson(56, 70), wilson(48, 80)
    a = Value(mean=56 / 70, lo=first[0], hi=first[1], values=(56 / 70,))
    b = Value(mean=48 / 80, lo=second[0], hi=second[1], values=(48 / 80,))
    assert difference(a, b) == pytest.approx((0.2, 0.0524, 0.3339), abs=1e-4)
