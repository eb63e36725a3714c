"""Losses as weighted sums over tokens (Eq. 4, GSPO, SFT), and importance weights for off-policy answers.

The sampler's distribution differs from the policy's: its weights may be older, and in bfloat16 engine and learner never
agree bit for bit. Importance weights (policy before the update / sampler) correct for this. Large ratios are truncated
(truncated importance sampling, TIS), or their tokens are masked (IcePop, masked importance sampling).
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
    """Sums of importance ratios over active tokens (weight not 0) and their answers: 0-d, additive over micro-batches.

    A ratio is policy before the update / sampler; a truncated ratio is at most the cap.
    """

    used: torch.Tensor  # sum of the factors applied to the tokens' advantages
    truncated: torch.Tensor  # sum of truncated token ratios
    cut: torch.Tensor  # number of tokens above the cap
    masked: torch.Tensor  # number of tokens whose gain is masked
    sequence_raw: torch.Tensor  # sum of answer ratios
    sequence_truncated: torch.Tensor  # sum of truncated answer ratios
    sequence_cut: torch.Tensor  # number of answers above the cap
    answers: torch.Tensor  # number of answers with an active token


# (log ratio of each token, 0 where inactive; answer index of each token) -> ratio of each token
Ratio = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

# (ratio of each token; lowest and highest trusted ratio) -> mask of the tokens whose gain counts
Kept = Callable[[torch.Tensor, float, float], torch.Tensor]


def no_ratio(log_ratio: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    """Return 1 for every token: no correction."""
    return torch.ones_like(log_ratio)


def token_ratio(log_ratio: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    """Return the ratio of each token."""
    return log_ratio.exp()


def sequence_ratio(log_ratio: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    """Return the ratio of the token's answer, the product over its tokens; they must all be in one call."""
    return sums_by_answer(log_ratio, answers).exp()[answers]


def all_kept(ratio: torch.Tensor, low: float, cap: float) -> torch.Tensor:
    """Mask no token: ratios above the cap are truncated (TIS)."""
    return torch.ones_like(ratio, dtype=torch.bool)


def kept_between(ratio: torch.Tensor, low: float, cap: float) -> torch.Tensor:
    """Mask tokens outside [low, cap] (IcePop): a token far less likely under the policy is not trusted either."""
    return (ratio >= low) & (ratio <= cap)


def kept_below(ratio: torch.Tensor, low: float, cap: float) -> torch.Tensor:
    """Mask tokens above the cap (masked importance sampling)."""
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
    """Return the factor on each token's advantage, without gradient, and its statistics; all tensors have one shape.

    `bounds` are the lowest and highest trusted ratio, low <= 1 <= cap: the factor is min(ratio, cap), or 0 where the
    correction masks. A masked token keeps its share of the step's weight: the weights of other tokens do not grow. A
    factor on the advantages affects only the gain: the KL term is unchanged, and clipped tokens stay clipped.
    """
    low, cap = bounds
    active = loss_weights != 0
    log_ratio = blank_inactive(old_logprobs.detach() - sampler_logprobs, active).double()
    ratio_of, kept_by = CORRECTIONS[correction]
    ratio = ratio_of(log_ratio, answers)
    kept = kept_by(ratio, low, cap)
    used = blank_inactive(ratio.clamp(max=cap), kept)
    token = log_ratio[active].exp()
    answer = sums_by_answer(log_ratio, answers).exp()[sums_by_answer(active.double(), answers) > 0]
    terms = RatioTerms(
        used=used[active].sum(),
        truncated=token.clamp(max=cap).sum(),
        cut=(token > cap).sum(),
        masked=(~kept[active]).sum(),
        sequence_raw=answer.sum(),
        sequence_truncated=answer.clamp(max=cap).sum(),
        sequence_cut=(answer > cap).sum(),
        answers=token.new_tensor(len(answer)),
    )
    return used.to(old_logprobs.dtype), terms


@dataclass(frozen=True, slots=True, kw_only=True)
class LossTerms:
    """Statistics of a loss over its active tokens (weight not 0): detached 0-d tensors, additive over micro-batches."""

    kl_sum: torch.Tensor  # always k3, whichever estimator is trained, so that runs are comparable
    clipped: torch.Tensor  # number of tokens whose gain is clipped


class Loss(Protocol):
    """Interface of a loss: a weighted sum over tokens, and its statistics.

    All tensors have one shape, with any number of dimensions; `answers` is the answer index of each token, from 0
    without gaps. `clip_eps` is (low, high): the ratio is clipped to 1 - low .. 1 + high. `estimator` is a key of
    kl.ESTIMATORS. All means (over an answer's tokens, its group, the groups) are part of `loss_weights`. A token of
    weight 0 adds nothing to loss and gradient, whatever its values (NaN included). The KL is measured if there is a
    reference, and trained if beta is not 0 as well.
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
    """Return the negative of Eq. 4: the sum over tokens of weight * (beta * KL - min(ratio * A, clip(ratio) * A))."""
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
    """Return the GSPO loss: Eq. 4 with the ratio of the whole answer, exp(mean over its tokens of log pi/old).

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
    """Return the negative log likelihood: the sum over tokens of -weight * logprob; the other inputs are ignored."""
    active = loss_weights != 0
    policy = blank_inactive(policy_logprobs, active)
    zero = torch.zeros_like(policy).sum()
    loss = -(blank_inactive(loss_weights, active) * policy).sum()
    return loss, LossTerms(kl_sum=zero, clipped=zero)


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
    """Return the loss of clipped gain and KL for given log ratios, per token or per answer."""
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

    # An inactive token's advantage is 0, so it never counts as clipped.
    terms = LossTerms(kl_sum=kl_sum, clipped=(clipped_gain < gain).sum())
    return (blank_inactive(loss_weights, active) * token_loss).sum(), terms


def _log_ratio(policy_logprobs: torch.Tensor, old_logprobs: torch.Tensor, loss_weights: torch.Tensor) -> torch.Tensor:
    """Return log pi/old of each token; 0 where inactive."""
    active = loss_weights != 0
    return blank_inactive(policy_logprobs, active) - blank_inactive(old_logprobs, active)


def _answer_means(values: torch.Tensor, active: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    """Return the mean over the active tokens of each token's answer, in the shape of `values` (0 where inactive)."""
    counts = sums_by_answer(active.to(values.dtype), answers)
    means = sums_by_answer(values, answers) / counts.clamp(min=1)
    return means[answers]
