"""Truncated importance sampling: an answer of older weights counts by how likely the policy finds it now."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from othink_ray.core.tokens import blank_inactive, sums_by_answer


@dataclass(frozen=True, slots=True, kw_only=True)
class RatioTerms:
    """What a correction saw on its active tokens (weight not 0) and their answers: 0-d tensors that add up.

    A ratio is that of the policy before the update to the sampler; truncated, it is at most the cap.
    """

    used: torch.Tensor  # what the tokens' gains are multiplied by
    truncated: torch.Tensor  # of tokens
    cut: torch.Tensor  # tokens above the cap
    sequence_raw: torch.Tensor  # of answers
    sequence_truncated: torch.Tensor
    sequence_cut: torch.Tensor  # answers above the cap
    answers: torch.Tensor  # those with an active token


# (log ratio of each token, 0 where inactive; its answer) -> ratio of each token
Ratio = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def no_ratio(log_ratio: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    """Every token counts in full."""
    return torch.ones_like(log_ratio)


def token_ratio(log_ratio: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    """Each token's own."""
    return log_ratio.exp()


def sequence_ratio(log_ratio: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    """That of the whole answer, the product over its tokens; all of them must be in one call."""
    return sums_by_answer(log_ratio, answers).exp()[answers.flatten()].view(log_ratio.shape)


CORRECTIONS: dict[str, Ratio] = {"none": no_ratio, "token": token_ratio, "sequence": sequence_ratio}


def importance(
    correction: str,
    old_logprobs: torch.Tensor,
    sampler_logprobs: torch.Tensor,
    loss_weights: torch.Tensor,
    answers: torch.Tensor,
    *,
    cap: float,
) -> tuple[torch.Tensor, RatioTerms]:
    """What each token's advantage is to be multiplied by, min(ratio, cap), without gradient; all have one shape.

    A factor on the advantages acts on the gain alone: the KL does not see it, and what is clipped stays so.
    """
    active = loss_weights != 0
    log_ratio = blank_inactive(old_logprobs.detach() - sampler_logprobs, active).double()
    used = CORRECTIONS[correction](log_ratio, answers).clamp(max=cap)
    own = log_ratio[active].exp()
    whole = sums_by_answer(log_ratio, answers).exp()[sums_by_answer(active.double(), answers) > 0]
    terms = RatioTerms(
        used=used[active].sum(),
        truncated=own.clamp(max=cap).sum(),
        cut=(own > cap).sum(),
        sequence_raw=whole.sum(),
        sequence_truncated=whole.clamp(max=cap).sum(),
        sequence_cut=(whole > cap).sum(),
        answers=own.new_tensor(len(whole)),
    )
    return used.to(old_logprobs.dtype), terms
