"""Losses of a step as plain weighted sums over tokens (Eq. 4): they add up over micro-batches and ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from othink_ray.core.kl import ESTIMATORS, MAX_LOG_RATIO, kl_k3
from othink_ray.core.tokens import blank_inactive, sums_by_answer


@dataclass(frozen=True, slots=True, kw_only=True)
class LossTerms:
    """What a loss saw on its active tokens (weight not 0): detached 0-d tensors that add up."""

    kl_sum: torch.Tensor  # k3, whichever estimator is trained: runs stay comparable
    clipped: torch.Tensor  # tokens whose gradient the clip cut


class Loss(Protocol):
    """All tensors have one shape, of any rank; `answers` says which answer a token belongs to, from 0 without gaps.

    `clip_eps` is (low, high): the ratio is clipped to 1 - low .. 1 + high. `estimator` is a key of kl.ESTIMATORS.
    All means (over an answer's tokens, its group, the groups) are inside `loss_weights`. A token of weight 0 adds
    nothing to loss and gradient, whatever stands there. KL is measured where there is a reference, and trained where
    beta is not 0.
    """

    def __call__(
        self,
        policy_logprobs: torch.Tensor,
        old_logprobs: torch.Tensor,
        ref_logprobs: torch.Tensor | None,
        advantages: torch.Tensor,
        loss_weights: torch.Tensor,
        *,
        answers: torch.Tensor,
        beta: float,
        clip_eps: tuple[float, float],
        estimator: str,
    ) -> tuple[torch.Tensor, LossTerms]: ...


def grpo_loss(
    policy_logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    ref_logprobs: torch.Tensor | None,
    advantages: torch.Tensor,
    loss_weights: torch.Tensor,
    *,
    answers: torch.Tensor,
    beta: float,
    clip_eps: tuple[float, float],
    estimator: str,
) -> tuple[torch.Tensor, LossTerms]:
    """Eq. 4 negated: the sum over tokens of weight * (beta * KL - min(ratio * A, clip(ratio) * A))."""
    log_ratio = _log_ratio(policy_logprobs, old_logprobs, loss_weights)
    return _clipped_loss(log_ratio, policy_logprobs, ref_logprobs, advantages, loss_weights, beta, clip_eps, estimator)


def gspo_loss(
    policy_logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    ref_logprobs: torch.Tensor | None,
    advantages: torch.Tensor,
    loss_weights: torch.Tensor,
    *,
    answers: torch.Tensor,
    beta: float,
    clip_eps: tuple[float, float],
    estimator: str,
) -> tuple[torch.Tensor, LossTerms]:
    """GSPO: as Eq. 4, but every token has its answer's ratio, exp(mean over its tokens of log pi/old).

    Whole answers are clipped, so all tokens of an answer must be in one call.
    """
    log_ratio = _log_ratio(policy_logprobs, old_logprobs, loss_weights)
    log_ratio = _answer_means(log_ratio, loss_weights != 0, answers)
    return _clipped_loss(log_ratio, policy_logprobs, ref_logprobs, advantages, loss_weights, beta, clip_eps, estimator)


def sft_loss(
    policy_logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    ref_logprobs: torch.Tensor | None,
    advantages: torch.Tensor,
    loss_weights: torch.Tensor,
    *,
    answers: torch.Tensor,
    beta: float,
    clip_eps: tuple[float, float],
    estimator: str,
) -> tuple[torch.Tensor, LossTerms]:
    """Negative log likelihood: the sum over tokens of -weight * logprob; the other inputs do not matter to it."""
    active = loss_weights != 0
    policy = blank_inactive(policy_logprobs, active)
    nothing = torch.zeros_like(policy).sum()
    loss = -(blank_inactive(loss_weights, active) * policy).sum()
    return loss, LossTerms(kl_sum=nothing, clipped=nothing)


LOSSES: dict[str, Loss] = {"grpo": grpo_loss, "gspo": gspo_loss, "sft": sft_loss}


def _clipped_loss(
    log_ratio: torch.Tensor,
    policy_logprobs: torch.Tensor,
    ref_logprobs: torch.Tensor | None,
    advantages: torch.Tensor,
    loss_weights: torch.Tensor,
    beta: float,
    clip_eps: tuple[float, float],
    estimator: str,
) -> tuple[torch.Tensor, LossTerms]:
    """The clipped gain and the KL, for whatever ratio each token has."""
    active = loss_weights != 0
    advantage = blank_inactive(advantages, active)
    low, high = clip_eps
    ratio = log_ratio.clamp(max=MAX_LOG_RATIO).exp()
    gain = ratio * advantage
    clipped_gain = ratio.clamp(1 - low, 1 + high) * advantage
    token_loss = -torch.minimum(gain, clipped_gain)

    kl_sum = torch.zeros_like(ratio).sum()
    if ref_logprobs is not None:
        policy, ref = blank_inactive(policy_logprobs, active), blank_inactive(ref_logprobs, active)
        kl_sum = kl_k3(policy.detach(), ref).sum()
        if beta != 0:
            token_loss = token_loss + beta * ESTIMATORS[estimator](policy, ref)

    # An inactive token's advantage is blank, so it is never clipped.
    terms = LossTerms(kl_sum=kl_sum, clipped=(clipped_gain < gain).sum())
    return (blank_inactive(loss_weights, active) * token_loss).sum(), terms


def _log_ratio(policy_logprobs: torch.Tensor, old_logprobs: torch.Tensor, loss_weights: torch.Tensor) -> torch.Tensor:
    """log pi/old of each token; 0 where inactive."""
    active = loss_weights != 0
    return blank_inactive(policy_logprobs, active) - blank_inactive(old_logprobs, active)


def _answer_means(values: torch.Tensor, active: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    """Each token's answer's mean over its active tokens, in the shape of `values`, which is 0 where inactive."""
    counts = sums_by_answer(active.to(values.dtype), answers)
    means = sums_by_answer(values, answers) / counts.clamp(min=1)
    return means[answers]
