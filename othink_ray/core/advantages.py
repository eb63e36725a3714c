"""Group-relative advantages: GRPO's (Eq. 2), and those of Dr. GRPO, RLOO and REINFORCE++."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray

DDOF = 1  # std(r) of Eq. 2 is the sample std, as in the R1-V recipe that the paper follows (torch's default)
EPS = 1e-8  # far below any real difference between rewards, far above float64 rounding


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
    """Return (r - mean) / (std + eps) within each group (Eq. 2), over the last axis of (G,) or (N, G), in float64.

    Invalid answers are excluded from mean and std, and get 0. Equal rewards give exactly 0: they are detected by
    comparison, not by a small std. Rewards that differ at all give nonzero advantages of magnitude at most
    (G - 1) / sqrt(G), close to 0 when the difference is within float64 rounding (far below eps).
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
    advantages = _normalize(values, mask, eps)
    return torch.from_numpy(advantages).to(rewards.device) if isinstance(rewards, torch.Tensor) else advantages


def mean_advantages(rewards: NDArray[np.float64], valid: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return Dr. GRPO's advantages, r - group mean: (N, G) -> (N, G).

    There is no division by the std, so easy and hard questions weigh the same.
    """
    _check(rewards, valid, EPS)
    return _deviations(rewards, valid)


def leave_one_out_advantages(rewards: NDArray[np.float64], valid: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return RLOO's advantages, r - mean of the group's other answers: (N, G) -> (N, G).

    This equals n / (n - 1) times the deviation from the mean of all n valid answers.
    """
    _check(rewards, valid, EPS)
    counted = valid.sum(axis=-1, keepdims=True)
    result: NDArray[np.float64] = _deviations(rewards, valid) * counted / np.maximum(counted - 1, 1)
    return result


def batch_advantages(rewards: NDArray[np.float64], valid: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return REINFORCE++ (with baseline) advantages: (r - group mean) / std over the whole step, (N, G) -> (N, G).

    The mean of these deviations over all answers of the step is already 0; subtracting their mean over tokens would
    give groups of equal rewards small nonzero advantages.
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
    """Return whether the valid rewards of one group (G,) differ: only then does the group have a policy gradient."""
    return bool(_deviations(rewards, valid).any())


def _normalize(values: NDArray[np.float64], mask: NDArray[np.bool_], eps: float) -> NDArray[np.float64]:
    """Compute Eq. 2 over the last axis."""
    counted = mask.sum(axis=-1, keepdims=True)
    deviations = _deviations(values, mask)
    std = np.sqrt((deviations**2).sum(axis=-1, keepdims=True) / np.maximum(counted - DDOF, 1))
    result: NDArray[np.float64] = deviations / (std + eps)
    return result


def _deviations(values: NDArray[np.float64], mask: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return r - mean of the valid answers over the last axis; exactly 0 where they are all equal, or invalid."""
    values = np.where(mask, values, 0.0)
    counted = mask.sum(axis=-1, keepdims=True)
    first_valid = np.take_along_axis(values, mask.argmax(axis=-1, keepdims=True), axis=-1)
    # True with one valid answer and with none: there is nothing to compare with.
    all_equal = ((values == first_valid) | ~mask).all(axis=-1, keepdims=True)
    mean = values.sum(axis=-1, keepdims=True) / np.maximum(counted, 1)
    result: NDArray[np.float64] = np.where(mask & ~all_equal, values - mean, 0.0)
    return result


def _check(values: NDArray[np.float64], mask: NDArray[np.bool_], eps: float) -> None:
    """Raise ValueError for shapes and values on which Eq. 2 is undefined."""
    if values.ndim not in (1, 2):
        raise ValueError(f"rewards have shape {values.shape}: expected (G,) for one group or (N, G) for several")
    if values.shape[-1] < 2:
        raise ValueError(
            f"algo.group_size = {values.shape[-1]} must be at least 2: advantages compare answers within a group"
        )
    if mask.shape != values.shape:
        raise ValueError(f"valid has shape {mask.shape}, rewards have {values.shape}: pass one flag per reward")
    if not np.isfinite(values[mask]).all():
        raise ValueError(f"rewards contain {values[mask & ~np.isfinite(values)][0]}: mark this answer as invalid")
    if not eps > 0:
        raise ValueError(f"eps = {eps} must be greater than 0: rounding must not count as a reward difference")
