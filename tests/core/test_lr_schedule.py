"""Learning rate schedules over a run."""

from __future__ import annotations

import math

import pytest

from othink_ray.core.lr_schedule import LR_SCHEDULES, learning_rate


@pytest.mark.parametrize("name", LR_SCHEDULES)
def test_every_schedule_starts_at_the_peak(name: str) -> None:
    assert learning_rate(name, 0, 100, 2e-4) == pytest.approx(2e-4)


def test_linear_reaches_zero_one_step_after_the_last() -> None:
    rates = [learning_rate("linear", step, 4, 8.0) for step in range(5)]
    assert rates == pytest.approx([8, 6, 4, 2, 0])


def test_cosine_is_half_a_cosine_wave() -> None:
    rates = [learning_rate("cosine", step, 10, 2.0) for step in range(11)]
    assert rates == pytest.approx([1 + math.cos(math.pi * step / 10) for step in range(11)])


def test_warm_up_rises_to_the_peak_before_the_schedule() -> None:
    rates = [learning_rate("linear", step, 7, 4.0, warmup_frac=3 / 7) for step in range(8)]
    assert rates == pytest.approx([1, 2, 3, 4, 3, 2, 1, 0])


def test_constant_is_constant() -> None:
    assert {learning_rate("constant", step, 7, 0.5) for step in range(7)} == {0.5}


def test_an_unknown_schedule_is_rejected_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"learner\.lr_schedule = .step. is not a schedule: use one of constant"):
        learning_rate("step", 0, 1, 1.0)
