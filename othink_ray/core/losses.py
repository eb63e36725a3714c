"""Losses of a step as plain weighted sums over tokens (Eq. 4): they add up over micro-batches and ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from othink_ray.core.kl import MAX_LOG_RATIO, kl_k3


@dataclass(frozen=True, slots=True, kw_only=True)
class LossTerms:
    """What a loss saw on its active tokens (weight not 0): detached 0-d tensors; all but `ratio_max` add up."""

    kl_sum: torch.Tensor
    ratio_sum: torch.Tensor
    ratio_max: torch.Tensor  # before clipping; 0 without active tokens
    clipped: torch.Tensor  # tokens whose gradient the clip cut
    tokens: torch.Tensor


class Loss(Protocol):
    """All tensors have one shape, of any rank; see `grpo_loss`."""

    def __call__(
        self,
        policy_logprobs: torch.Tensor,
        old_logprobs: torch.Tensor,
        ref_logprobs: torch.Tensor | None,
        advantages: torch.Tensor,
        loss_weights: torch.Tensor,
        *,
        beta: float,
        clip_eps: float,
    ) -> tuple[torch.Tensor, LossTerms]: ...


def grpo_loss(
    policy_logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    ref_logprobs: torch.Tensor | None,
    advantages: torch.Tensor,
    loss_weights: torch.Tensor,
    *,
    beta: float,
    clip_eps: float,
) -> tuple[torch.Tensor, LossTerms]:
    """Eq. 4 negated: the sum over tokens of weight * (beta * KL - min(ratio * A, clip(ratio) * A)).

    All means (over an answer's tokens, its group, the groups) are inside `loss_weights`. A token of weight 0 adds
    nothing to loss and gradient, whatever stands there. KL is measured where there is a reference, and trained where
    beta is not 0.
    """
    active = loss_weights != 0
    policy = _blank_inactive(policy_logprobs, active)
    old = _blank_inactive(old_logprobs, active)
    advantage = _blank_inactive(advantages, active)

    ratio = (policy - old).clamp(max=MAX_LOG_RATIO).exp()
    gain = ratio * advantage
    clipped_gain = ratio.clamp(1 - clip_eps, 1 + clip_eps) * advantage
    token_loss = -torch.minimum(gain, clipped_gain)

    kl = torch.zeros_like(policy)
    if ref_logprobs is not None:
        kl = kl_k3(policy, _blank_inactive(ref_logprobs, active))
        if beta != 0:
            token_loss = token_loss + beta * kl

    terms = _terms(active, kl=kl.detach(), ratio=ratio.detach(), clipped=clipped_gain < gain)
    return (_blank_inactive(loss_weights, active) * token_loss).sum(), terms


def sft_loss(
    policy_logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    ref_logprobs: torch.Tensor | None,
    advantages: torch.Tensor,
    loss_weights: torch.Tensor,
    *,
    beta: float,
    clip_eps: float,
) -> tuple[torch.Tensor, LossTerms]:
    """Negative log likelihood: the sum over tokens of -weight * logprob; the other inputs do not matter to it."""
    active = loss_weights != 0
    policy = _blank_inactive(policy_logprobs, active)
    untouched = torch.ones_like(policy)
    terms = _terms(active, kl=torch.zeros_like(policy), ratio=untouched, clipped=torch.zeros_like(active))
    return -(_blank_inactive(loss_weights, active) * policy).sum(), terms


LOSSES: dict[str, Loss] = {"grpo": grpo_loss, "sft": sft_loss}


def _blank_inactive(values: torch.Tensor, active: torch.Tensor) -> torch.Tensor:
    """0 where a token is inactive: chosen before any exp, since 0 * inf is NaN and so is its gradient."""
    return torch.where(active, values, torch.zeros_like(values))


def _terms(active: torch.Tensor, *, kl: torch.Tensor, ratio: torch.Tensor, clipped: torch.Tensor) -> LossTerms:
    """Sums over the active tokens; an inactive one is never clipped, its advantage being blank."""
    active_ratio = _blank_inactive(ratio, active)
    return LossTerms(
        kl_sum=_blank_inactive(kl, active).sum(),
        ratio_sum=active_ratio.sum(),
        ratio_max=active_ratio.max() if active.numel() else active_ratio.sum(),
        clipped=clipped.sum(),
        tokens=active.sum(),
    )
