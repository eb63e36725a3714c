"""Group-relative advantages (Eq. 2)."""

from __future__ import annotations

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
    advantages = _normalise(np.where(mask, values, 0.0), mask, eps)
    return torch.from_numpy(advantages).to(rewards.device) if isinstance(rewards, torch.Tensor) else advantages


def _normalise(values: NDArray[np.float64], mask: NDArray[np.bool_], eps: float) -> NDArray[np.float64]:
    """Eq. 2 over the last axis, where masked-out values are 0."""
    counted = mask.sum(axis=-1, keepdims=True)
    first_valid = np.take_along_axis(values, mask.argmax(axis=-1, keepdims=True), axis=-1)
    # One valid answer equals itself, and none are all equal: both are groups without a comparison.
    all_equal = ((values == first_valid) | ~mask).all(axis=-1, keepdims=True)
    mean = values.sum(axis=-1, keepdims=True) / np.maximum(counted, 1)
    deviation = np.where(mask, values - mean, 0.0)
    std = np.sqrt((deviation**2).sum(axis=-1, keepdims=True) / np.maximum(counted - DDOF, 1))
    result: NDArray[np.float64] = np.where(all_equal, 0.0, deviation / (std + eps))
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
