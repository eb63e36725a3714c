"""KL schedules (Eq. 3) and KL estimators (Eq. 5)."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from othink_ray.core.kl import ESTIMATORS, SCHEDULES, kl_k3, schedule
from tests.reference import grpo_d

REPEATABLE = settings(deadline=None, derandomize=True)

PAPER_COUNTING = {"total": 100, "beta_min": 0.04, "beta_max": 0.1, "explore_frac": 0.3}


@pytest.mark.parametrize(
    ("step", "beta"),
    [(0, 0.07), (15, 0.055), (30, 0.04), (65, 0.07), (100, 0.1), (101, 0.1), (10_000, 0.1)],
)
def test_paper_schedule_passes_through_points_computed_by_hand(step: int, beta: float) -> None:
    assert schedule("paper", step, **PAPER_COUNTING) == pytest.approx(beta, abs=1e-12)


def test_paper_schedule_without_exploration_only_rises() -> None:
    betas = [schedule("paper", step, 10, 0.04, 0.1, 0.0) for step in range(11)]
    assert betas[0] == 0.04
    assert betas == sorted(betas)
    assert betas[5] == pytest.approx(0.07, abs=1e-12)
    assert betas[10] == pytest.approx(0.1, abs=1e-12)


def test_paper_schedule_of_exploration_only_falls() -> None:
    assert schedule("paper", 0, 10, 0.04, 0.1, 1.0) == pytest.approx(0.07, abs=1e-12)
    assert schedule("paper", 5, 10, 0.04, 0.1, 1.0) == pytest.approx(0.055, abs=1e-12)
    assert schedule("paper", 10, 10, 0.04, 0.1, 1.0) == pytest.approx(0.04, abs=1e-12)
    assert schedule("paper", 11, 10, 0.04, 0.1, 1.0) == 0.1


def test_exploration_may_end_between_two_steps() -> None:
    # w = 2.1: step 2 still falls, step 3 already rises
    assert schedule("paper", 2, 7, 0.0, 0.02, 0.3) == pytest.approx(0.01 - 0.01 * 2 / 2.1, abs=1e-12)
    assert schedule("paper", 3, 7, 0.0, 0.02, 0.3) == pytest.approx(0.02 * 0.9 / 4.9, abs=1e-12)


@REPEATABLE
@given(
    total=st.integers(1, 2000),
    share=st.floats(0, 1.2),
    low=st.floats(0, 1),
    rise=st.floats(0, 1),
    explore_frac=st.floats(0, 1),
)
def test_paper_schedule_is_equation_3(total: int, share: float, low: float, rise: float, explore_frac: float) -> None:
    step = round(share * total)
    expected = grpo_d.beta(step, total, low, low + rise, explore_frac)
    assert schedule("paper", step, total, low, low + rise, explore_frac) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", ["linear", "cosine", "exponential"])
def test_a_ramp_rises_from_beta_min_to_beta_max_and_stays_there(name: str) -> None:
    betas = [schedule(name, step, 10, 0.01, 0.09, 0.3) for step in range(13)]
    assert betas[0] == pytest.approx(0.01, abs=1e-12)
    assert all(earlier < later for earlier, later in itertools.pairwise(betas[:11]))
    assert betas[10:] == pytest.approx([0.09] * 3, abs=1e-12)


@pytest.mark.parametrize(("name", "middle"), [("linear", 0.05), ("cosine", 0.05), ("exponential", 0.03)])
def test_each_ramp_has_the_midpoint_of_its_shape(name: str, middle: float) -> None:
    assert schedule(name, 5, 10, 0.01, 0.09, 0.3) == pytest.approx(middle, abs=1e-12)


def test_a_cosine_ramp_starts_slower_than_a_straight_one() -> None:
    expected = 0.08 * (1 - math.cos(math.pi / 5)) / 2
    assert schedule("cosine", 2, 10, 0.0, 0.08, 0.3) == pytest.approx(expected, abs=1e-12)


def test_constant_schedule_is_beta_min_at_every_step() -> None:
    assert {schedule("constant", step, 10, 0.04, 0.1, 0.3) for step in range(13)} == {0.04}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": "parabola"}, ["algo.kl.schedule", "'parabola'", "paper", "constant"]),
        ({"total": 0}, ["train.steps", "0", "1 or more"]),
        ({"total": float("nan")}, ["train.steps", "nan"]),
        ({"step": -1}, ["step", "-1", "0 or more"]),
        ({"explore_frac": 1.5}, ["algo.kl.explore_frac", "1.5", "0 to 1"]),
        ({"beta_min": -0.1}, ["algo.kl.beta_min", "-0.1"]),
        ({"beta_max": float("inf")}, ["algo.kl.beta_max", "inf"]),
        ({"name": "exponential", "beta_min": 0.0}, ["algo.kl.beta_min", "exponential", "greater than 0", "linear"]),
    ],
)
def test_invalid_schedule_arguments_are_rejected(change: dict[str, float | str], words: list[str]) -> None:
    arguments = {"name": "paper", "step": 0, **PAPER_COUNTING, **change}
    with pytest.raises(ValueError) as error:
        schedule(**arguments)  # type: ignore[arg-type]
    assert all(word in str(error.value) for word in words)


def test_every_schedule_can_be_called_by_name() -> None:
    assert all(math.isfinite(schedule(name, 1, 3, 0.01, 0.02, 0.3)) for name in SCHEDULES)


def test_schedules_load_without_torch() -> None:
    code = "import sys; from othink_ray.core.kl import schedule; schedule('paper', 0, 1, 0, 1, 0.3)"
    subprocess.run([sys.executable, "-c", f"{code}; sys.exit('torch' in sys.modules)"], check=True)


@REPEATABLE
@given(st.lists(st.tuples(st.floats(-15, 0), st.floats(-15, 0)), min_size=1, max_size=6))
def test_k3_is_equation_5(pairs: list[tuple[float, float]]) -> None:
    policy, ref = torch.tensor(pairs, dtype=torch.float64).unbind(1)
    expected = torch.stack([grpo_d.token_kl(p, r) for p, r in zip(policy, ref, strict=True)])
    torch.testing.assert_close(kl_k3(policy, ref), expected, rtol=1e-9, atol=1e-12)


def test_k3_of_equal_logprobs_is_exactly_zero() -> None:
    logprobs = torch.tensor([-0.3, -7.1, 0.0])
    assert torch.equal(kl_k3(logprobs, logprobs.clone()), torch.zeros(3))


def test_k3_keeps_tiny_differences() -> None:
    policy = torch.tensor([-1.0], dtype=torch.float64)
    k3 = kl_k3(policy, policy + 1e-8)
    torch.testing.assert_close(k3, torch.tensor([5e-17], dtype=torch.float64), rtol=1e-3, atol=0)


def test_k3_and_its_gradient_stay_finite_for_huge_differences() -> None:
    policy = torch.tensor([-500.0, 0.0], requires_grad=True)
    k3 = kl_k3(policy, torch.tensor([0.0, -500.0]))
    k3.sum().backward()
    assert policy.grad is not None
    assert torch.isfinite(k3).all() and torch.isfinite(policy.grad).all()
    assert k3[1].item() == pytest.approx(499.0)


def exact_and_estimated(name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return KL(pi || ref), the estimator's mean over pi, that mean's gradient, and both exact KL gradients (2, V)."""
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(5, generator=random, dtype=torch.float64).requires_grad_()
    ref = torch.log_softmax(torch.randn(5, generator=random, dtype=torch.float64), 0)
    log_p = torch.log_softmax(logits, 0)
    value = ESTIMATORS[name](log_p, ref)
    sampled = (log_p.exp().detach() * value).sum()
    (grad,) = torch.autograd.grad(sampled, logits, retain_graph=True)
    exact = (log_p.exp() * (log_p - ref)).sum()
    return (
        exact,
        sampled,
        grad,
        torch.stack(
            [
                torch.autograd.grad(exact, logits, retain_graph=True)[0],
                torch.autograd.grad((ref.exp() * (ref - log_p)).sum(), logits)[0],
            ]
        ),
    )


@pytest.mark.parametrize("name", ["k1", "k3"])
def test_k1_and_k3_are_the_kl_on_average(name: str) -> None:
    exact, sampled, _, _ = exact_and_estimated(name)
    torch.testing.assert_close(sampled, exact)


def test_k2_is_close_to_the_kl_only_for_close_distributions() -> None:
    exact, sampled, _, _ = exact_and_estimated("k2")
    assert sampled.item() != pytest.approx(exact.item(), rel=1e-3)
    log_p = torch.log_softmax(torch.tensor([0.0, 0.01, -0.02], dtype=torch.float64), 0)
    ref = torch.log_softmax(torch.zeros(3, dtype=torch.float64), 0)
    k2, k1 = (float((log_p.exp() * ESTIMATORS[name](log_p, ref)).sum()) for name in ("k2", "k1"))
    assert k2 == pytest.approx(k1, rel=1e-2)


def test_gradients_of_the_kl_estimators() -> None:
    torch.testing.assert_close(exact_and_estimated("k1")[2], torch.zeros(5, dtype=torch.float64))
    _, _, k2, (reverse, _) = exact_and_estimated("k2")
    torch.testing.assert_close(k2, reverse)
    _, _, k3, (_, forward) = exact_and_estimated("k3")
    torch.testing.assert_close(k3, forward)
