"""Importance correction: an answer counts by how likely the policy finds it, for the engines sampled it otherwise.

Older weights did, or the engine's own rounding: in bfloat16 engine and learner never agree to the bit. A large ratio is
truncated (TIS), or the tokens that have it are masked (IcePop, masked importance sampling).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from othink_ray.core.kl import ESTIMATORS, MAX_LOG_RATIO, kl_k3
from othink_ray.core.packed_sequence import blank_inactive, sums_by_answer


@dataclass(frozen=True, slots=True, kw_only=True)
class RatioTerms:
    """What a correction saw on its active tokens (weight not 0) and their answers: 0-d tensors that add up.

    A ratio is that of the policy before the update to the sampler; truncated, it is at most the cap.
    """

    used: torch.Tensor  # what the tokens' gains are multiplied by
    truncated: torch.Tensor  # of tokens
    cut: torch.Tensor  # tokens above the cap
    masked: torch.Tensor  # tokens whose gain is dropped
    sequence_raw: torch.Tensor  # of answers
    sequence_truncated: torch.Tensor
    sequence_cut: torch.Tensor  # answers above the cap
    answers: torch.Tensor  # those with an active token


# (log ratio of each token, 0 where inactive; its answer) -> ratio of each token
Ratio = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

# (ratio of each token; lowest and highest ratio that is trusted) -> whether its gain counts at all
Kept = Callable[[torch.Tensor, float, float], torch.Tensor]


def no_ratio(log_ratio: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    """Every token counts in full."""
    return torch.ones_like(log_ratio)


def token_ratio(log_ratio: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    """Each token's own."""
    return log_ratio.exp()


def sequence_ratio(log_ratio: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    """That of the whole answer, the product over its tokens; all of them must be in one call."""
    return sums_by_answer(log_ratio, answers).exp()[answers]


def all_kept(ratio: torch.Tensor, low: float, cap: float) -> torch.Tensor:
    """No token is masked: what is above the cap counts as the cap."""
    return torch.ones_like(ratio, dtype=torch.bool)


def kept_between(ratio: torch.Tensor, low: float, cap: float) -> torch.Tensor:
    """Masked on both sides: a token that the policy finds far less likely is as little trusted as a likelier one."""
    return (ratio >= low) & (ratio <= cap)


def kept_below(ratio: torch.Tensor, low: float, cap: float) -> torch.Tensor:
    """Masked above the cap alone."""
    return ratio <= cap


CORRECTIONS: dict[str, tuple[Ratio, Kept]] = {
    "none": (no_ratio, all_kept),
    "token": (token_ratio, all_kept),
    "sequence": (sequence_ratio, all_kept),
    "icepop": (token_ratio, kept_between),
    "mis_token": (token_ratio, kept_below),
    "mis_sequence": (sequence_ratio, kept_below),
}


def importance(
    correction: str,
    old_logprobs: torch.Tensor,
    sampler_logprobs: torch.Tensor,
    loss_weights: torch.Tensor,
    answers: torch.Tensor,
    *,
    bounds: tuple[float, float],
) -> tuple[torch.Tensor, RatioTerms]:
    """What each token's advantage is to be multiplied by, without gradient; all tensors have one shape.

    `bounds` are the lowest and the highest ratio that is trusted, low <= 1 <= cap: the factor is min(ratio, cap), and 0
    where the correction masks. A masked token keeps its share of the step's weight: the others' shares do not grow.
    A factor on the advantages acts on the gain alone: the KL does not see it, and what is clipped stays so.
    """
    low, cap = bounds
    active = loss_weights != 0
    log_ratio = blank_inactive(old_logprobs.detach() - sampler_logprobs, active).double()
    ratio_of, kept_by = CORRECTIONS[correction]
    ratio = ratio_of(log_ratio, answers)
    kept = kept_by(ratio, low, cap)
    used = blank_inactive(ratio.clamp(max=cap), kept)
    own = log_ratio[active].exp()
    whole = sums_by_answer(log_ratio, answers).exp()[sums_by_answer(active.double(), answers) > 0]
    terms = RatioTerms(
        used=used[active].sum(),
        truncated=own.clamp(max=cap).sum(),
        cut=(own > cap).sum(),
        masked=(~kept[active]).sum(),
        sequence_raw=whole.sum(),
        sequence_truncated=whole.clamp(max=cap).sum(),
        sequence_cut=(whole > cap).sum(),
        answers=own.new_tensor(len(whole)),
    )
    return used.to(old_logprobs.dtype), terms


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
