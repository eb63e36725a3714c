"""Tolerances for comparing learners that should have learned the same."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from othink_ray.engines.policy import Policy
from othink_ray.types import UpdateStats
from tests.engines.learner_process import Outcome

SEQUENCE_RATIOS = ("raw_mean", "truncated_mean", "truncated_frac")


def distance(found: dict[str, NDArray[np.float32]], expected: dict[str, NDArray[np.float32]]) -> tuple[float, str]:
    """Return the largest relative distance of a tensor, and its name."""
    assert set(expected) <= set(found)
    whole = max(float(np.linalg.norm(value)) for value in expected.values())
    return max(
        (float(np.linalg.norm(found[name] - value)) / max(float(np.linalg.norm(value)), 1e-3 * whole), name)
        for name, value in expected.items()
    )


def moved(outcome: Outcome, start: Outcome) -> dict[str, NDArray[np.float32]]:
    """Return the change of each weight in training: a tighter comparison than of the weights themselves."""
    return {name: weight - start.weights[name] for name, weight in outcome.weights.items()}


def assert_same_stats(found: Sequence[UpdateStats], expected: Sequence[UpdateStats]) -> None:
    for stats, other in zip(found, expected, strict=True):
        assert stats.tokens == other.tokens
        for field in ("loss", "kl_mean", "ratio_raw_mean", "ratio_raw_max", "entropy", "grad_norm"):
            assert getattr(stats, field) == pytest.approx(getattr(other, field), rel=1e-4, abs=1e-6, nan_ok=True), field
        for field in (
            "used_mean",
            "truncated_mean",
            "truncated_frac",
            "masked_frac",
            *(f"sequence_{ratio}" for ratio in SEQUENCE_RATIOS),
        ):
            assert getattr(stats, f"ratio_{field}") == pytest.approx(getattr(other, f"ratio_{field}"), rel=1e-4), field
        for field in ("ratio_clip_frac", "logp_gap_mean", "logp_gap_max", "lr"):
            assert getattr(stats, field) == pytest.approx(getattr(other, field), rel=1e-4), field


def gradients(policy: Policy, objective: Tensor) -> dict[str, Tensor]:
    policy.zero_grad(set_to_none=True)
    objective.backward()
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in policy.network.named_parameters()
    }


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    whole = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    assert whole > 0
    for name, gradient in expected.items():
        # A gradient that is only rounding noise is compared relative to the norm of the whole gradient.
        size = torch.maximum(gradient.norm(), 1e-3 * whole)
        assert (found[name] - gradient).norm() / size < tolerance, name
