"""Advantages: how much better an answer is than its group (Eq. 2), and what GRPO's relatives take for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray

DDOF = 1  # std(r) of Eq. 2 is the sample std, as in the R1-V recipe that the paper follows (torch's default)
EPS = 1e-8  # far below any real difference of rewards, far above float64 rounding


@overload
def group_advantages(rewards: torch.Tensor, valid: torch.Tensor | None = None, *, eps: float = EPS) -> torch.Tensor: ...


@overload
def group_advantages(
    rewards: NDArray[Any], valid: NDArray[np.bool_] | None = None, *, eps: float = EPS
) -> NDArray[np.float64]: ...


def group_advantages(
    rewards: torch.Tensor | NDArray[Any],
    valid: torch.Tensor | NDArray[np.bool_] | None = None,
    *,
    eps: float = EPS,
) -> torch.Tensor | NDArray[np.float64]:
    """Eq. 2: (r - mean) / (std + eps) inside each group, over the last axis of (G,) or (N, G); always float64.

    Invalid answers count in neither mean nor std, and get 0. Equal rewards give exactly 0 because they are compared,
    not because their std is small. Rewards that differ, however little, are different: at most (G - 1) / sqrt(G) in
    size, and next to nothing when they differ by no more than float64 rounding (far less than eps).
    """
    if isinstance(rewards, torch.Tensor):
        values = rewards.detach().to("cpu", torch.float64).numpy()
    else:
        values = np.asarray(rewards).astype(np.float64)
    mask = np.ones(values.shape, dtype=np.bool_)
    if valid is not None:
        mask = valid.detach().cpu().numpy() if isinstance(valid, torch.Tensor) else np.asarray(valid)
        mask = mask.astype(np.bool_)
    _check(values, mask, eps)
    advantages = _normalise(values, mask, eps)
    return torch.from_numpy(advantages).to(rewards.device) if isinstance(rewards, torch.Tensor) else advantages


def mean_advantages(rewards: NDArray[np.float64], valid: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Dr. GRPO: r - mean of the group, (N, G) -> (N, G); undivided, so that easy and hard questions weigh the same."""
    _check(rewards, valid, EPS)
    return _deviations(rewards, valid)


def leave_one_out_advantages(rewards: NDArray[np.float64], valid: NDArray[np.bool_]) -> NDArray[np.float64]:
    """RLOO: r - mean of the group's other answers, (N, G) -> (N, G); that is n / (n - 1) of the deviation from all."""
    _check(rewards, valid, EPS)
    counted = valid.sum(axis=-1, keepdims=True)
    result: NDArray[np.float64] = _deviations(rewards, valid) * counted / np.maximum(counted - 1, 1)
    return result


def batch_advantages(rewards: NDArray[np.float64], valid: NDArray[np.bool_]) -> NDArray[np.float64]:
    """REINFORCE++ with baseline: deviations from the group's mean, over their std in the whole step; (N, G) -> (N, G).

    One number an answer, so the step's mean is 0 already; taking off a mean over tokens would give dust to groups of
    equal rewards.
    """
    _check(rewards, valid, EPS)
    deviations = _deviations(rewards, valid)
    std = float(np.sqrt((deviations**2).sum() / max(int(valid.sum()) - DDOF, 1)))
    return deviations / (std + EPS)


# (rewards, valid) of the N groups of a step, (N, G) each -> advantages (N, G)
Advantages = Callable[[NDArray[np.float64], NDArray[np.bool_]], NDArray[np.float64]]

ADVANTAGES: dict[str, Advantages] = {
    "group_std": group_advantages,
    "group_mean": mean_advantages,
    "leave_one_out": leave_one_out_advantages,
    "batch_std": batch_advantages,
}


def rewards_differ(rewards: NDArray[np.float64], valid: NDArray[np.bool_]) -> bool:
    """Whether the valid answers of one group (G,) can be told apart: only then do they teach."""
    return bool(_deviations(rewards, valid).any())


def _normalise(values: NDArray[np.float64], mask: NDArray[np.bool_], eps: float) -> NDArray[np.float64]:
    """Eq. 2 over the last axis."""
    counted = mask.sum(axis=-1, keepdims=True)
    deviations = _deviations(values, mask)
    std = np.sqrt((deviations**2).sum(axis=-1, keepdims=True) / np.maximum(counted - DDOF, 1))
    result: NDArray[np.float64] = deviations / (std + eps)
    return result


def _deviations(values: NDArray[np.float64], mask: NDArray[np.bool_]) -> NDArray[np.float64]:
    """From the mean of the valid answers over the last axis; exactly 0 where all of them are equal, or not valid."""
    values = np.where(mask, values, 0.0)
    counted = mask.sum(axis=-1, keepdims=True)
    first_valid = np.take_along_axis(values, mask.argmax(axis=-1, keepdims=True), axis=-1)
    # One valid answer equals itself, and none are all equal: both are groups without a comparison.
    all_equal = ((values == first_valid) | ~mask).all(axis=-1, keepdims=True)
    mean = values.sum(axis=-1, keepdims=True) / np.maximum(counted, 1)
    result: NDArray[np.float64] = np.where(mask & ~all_equal, values - mean, 0.0)
    return result


def _check(values: NDArray[np.float64], mask: NDArray[np.bool_], eps: float) -> None:
    """Refuse shapes and numbers for which Eq. 2 has no meaning."""
    if values.ndim not in (1, 2):
        raise ValueError(f"rewards of shape {values.shape}: pass one group (G,) or many (N, G)")
    if values.shape[-1] < 2:
        raise ValueError(
            f"algo.group_size = {values.shape[-1]}: a group of one has nothing to compare with; use at least 2"
        )
    if mask.shape != values.shape:
        raise ValueError(f"valid of shape {mask.shape} is not that of rewards, {values.shape}: pass one flag each")
    if not np.isfinite(values[mask]).all():
        raise ValueError(f"rewards hold {values[mask & ~np.isfinite(values)][0]}: mark such answers as not valid")
    if not eps > 0:
        raise ValueError(f"eps = {eps} must be above 0: it keeps rounding in rewards from counting as a difference")
