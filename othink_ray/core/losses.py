"""Losses as weighted sums over tokens (Eq. 4, GSPO, SFT), and importance weights for off-policy answers.

The sampler's distribution differs from the policy's: its weights may be older, and in bfloat16 engine and learner never
agree bit for bit. Importance weights (policy before the update / sampler) correct for this. Large ratios are truncated
(truncated importance sampling, TIS), or their tokens are masked (IcePop, masked importance sampling).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

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
    masked: torch.Tensor  # number of masked tokens, whose factor is 0
    sequence_raw: torch.Tensor  # sum of answer ratios
    sequence_truncated: torch.Tensor  # sum of truncated answer ratios
    sequence_cut: torch.Tensor  # number of answers above the cap
    answers: torch.Tensor  # number of answers with an active token


# (log ratio of each token, 0 where inactive; answer index of each token) -> ratio of each token
Ratio = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

# (ratio of each token; lowest and highest trusted ratio) -> mask, False on the tokens whose factor becomes 0
Kept = Callable[[torch.Tensor, float, float], torch.Tensor]


def no_ratio(log_ratio: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    """Return 1 for every token: no importance sampling."""
    return torch.ones_like(log_ratio)


def token_ratio(log_ratio: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    """Return the ratio of each token."""
    return log_ratio.exp()


def sequence_ratio(log_ratio: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    """Return for each token the ratio of its whole answer, a product over tokens; a call must hold whole answers."""
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


TIS_MODES: dict[str, tuple[Ratio, Kept]] = {
    "none": (no_ratio, all_kept),
    "token": (token_ratio, all_kept),
    "sequence": (sequence_ratio, all_kept),
    "icepop": (token_ratio, kept_between),
    "mis_token": (token_ratio, kept_below),
    "mis_sequence": (sequence_ratio, kept_below),
}


def importance_weights(
    mode: str,
    old_logprobs: torch.Tensor,
    sampler_logprobs: torch.Tensor,
    loss_weights: torch.Tensor,
    answers: torch.Tensor,
    *,
    bounds: tuple[float, float],
) -> tuple[torch.Tensor, RatioTerms]:
    """Return the factor on each token's advantage, without gradient, and its statistics; all tensors have one shape.

    `bounds` are the lowest and highest trusted ratio, low <= 1 <= cap: the factor is min(ratio, cap), or 0 where the
    mode masks. A masked token keeps its share of the step's weight: the weights of other tokens do not grow. A
    factor on the advantages scales only the surrogate, min(ratio * A, clip(ratio) * A): the KL term is unchanged, and
    clipped tokens stay clipped.
    """
    low, cap = bounds
    active = loss_weights != 0
    log_ratio = blank_inactive(old_logprobs.detach() - sampler_logprobs, active).double()
    ratio_of, kept_by = TIS_MODES[mode]
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
    clipped: torch.Tensor  # number of tokens whose surrogate is clipped


@dataclass(frozen=True, slots=True, kw_only=True)
class LossInputs:
    """Inputs of a loss for one micro-batch; the tensors have one shape, with any number of dimensions.

    A token of weight 0 adds nothing to loss and gradient, whatever its values (NaN included).
    """

    policy_logprobs: torch.Tensor
    old_logprobs: torch.Tensor  # of the policy before the update
    ref_logprobs: torch.Tensor | None  # None: the KL is neither measured nor trained
    advantages: torch.Tensor
    loss_weights: torch.Tensor  # shares of the optimizer step: all means (tokens, answers, groups) are part of them
    answers: torch.Tensor  # answer index of each token, from 0 without gaps
    beta: float  # KL weight; 0: the KL is measured, not trained
    clip_eps: tuple[float, float]  # (low, high): the ratio is clipped to 1 - low .. 1 + high
    estimator: str  # of the trained KL, a key of kl.ESTIMATORS

    @property
    def active(self) -> torch.Tensor:
        """Mask of the tokens that count."""
        return self.loss_weights != 0

    def log_ratio(self) -> torch.Tensor:
        """Return log(policy / old) of each token; 0 where inactive."""
        return blank_inactive(self.policy_logprobs, self.active) - blank_inactive(self.old_logprobs, self.active)


# A weighted sum over tokens (0-d, with gradient) and its statistics
Loss = Callable[[LossInputs], tuple[torch.Tensor, LossTerms]]


def grpo_loss(inputs: LossInputs) -> tuple[torch.Tensor, LossTerms]:
    """Return the negative of Eq. 4: the sum over tokens of weight * (beta * KL - min(ratio * A, clip(ratio) * A))."""
    return _clipped_loss(inputs, inputs.log_ratio())


def gspo_loss(inputs: LossInputs) -> tuple[torch.Tensor, LossTerms]:
    """Return the GSPO loss: Eq. 4 with the ratio of the whole answer, exp(mean over its tokens of log pi/old).

    Whole answers are clipped, so all tokens of an answer must be in one call.
    """
    return _clipped_loss(inputs, _answer_means(inputs.log_ratio(), inputs.active, inputs.answers))


def sft_loss(inputs: LossInputs) -> tuple[torch.Tensor, LossTerms]:
    """Return the negative log likelihood: the sum over tokens of -weight * logprob; the other inputs are ignored."""
    policy = blank_inactive(inputs.policy_logprobs, inputs.active)
    zero = torch.zeros_like(policy).sum()
    loss = -(blank_inactive(inputs.loss_weights, inputs.active) * policy).sum()
    return loss, LossTerms(kl_sum=zero, clipped=zero)


LOSSES: dict[str, Loss] = {"grpo": grpo_loss, "gspo": gspo_loss, "sft": sft_loss}


def _clipped_loss(inputs: LossInputs, log_ratio: torch.Tensor) -> tuple[torch.Tensor, LossTerms]:
    """Return the loss of clipped surrogate and KL, with log(policy / old) per token or of each token's whole answer."""
    active = inputs.active
    advantage = blank_inactive(inputs.advantages, active)
    low, high = inputs.clip_eps
    ratio = log_ratio.clamp(max=MAX_LOG_RATIO).exp()
    gain = ratio * advantage
    clipped_gain = ratio.clamp(1 - low, 1 + high) * advantage
    token_loss = -torch.minimum(gain, clipped_gain)

    kl_sum = torch.zeros_like(ratio).sum()
    if inputs.ref_logprobs is not None:
        policy, ref = blank_inactive(inputs.policy_logprobs, active), blank_inactive(inputs.ref_logprobs, active)
        kl_sum = kl_k3(policy.detach(), ref).sum()
        if inputs.beta != 0:
            token_loss = token_loss + inputs.beta * ESTIMATORS[inputs.estimator](policy, ref)

    # An inactive token's advantage is 0, so it never counts as clipped.
    terms = LossTerms(kl_sum=kl_sum, clipped=(clipped_gain < gain).sum())
    return (blank_inactive(inputs.loss_weights, active) * token_loss).sum(), terms


def _answer_means(values: torch.Tensor, active: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    """Return the mean over the active tokens of each token's answer, in the shape of `values` (0 where inactive)."""
    counts = sums_by_answer(active.to(values.dtype), answers)
    means = sums_by_answer(values, answers) / counts.clamp(min=1)
    return means[answers]
