"""Slow reference of GRPO-D as in the paper: plain loops over answers and tokens, nothing shared with othink_ray.core.

In order: the KL weight (Eq. 3), the advantage (Eq. 2), the KL of a token (Eq. 5), the loss (Eq. 4), then the model's
input rows. Logprobs are torch scalars, so that autograd gives the gradient of the slow loss too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch


def beta(step: float, total: float, beta_min: float, beta_max: float, explore_frac: float) -> float:
    """Return the KL weight of Eq. 3."""
    w = explore_frac * total
    mid = (beta_min + beta_max) / 2
    if step > total:
        return beta_max
    if w == 0:
        return beta_min + (beta_max - beta_min) * step / total
    if step <= w:
        return mid - (mid - beta_min) * step / w
    return beta_min + (beta_max - beta_min) * (step - w) / (total - w)


def advantages(rewards: Sequence[float], valid: Sequence[bool], eps: float) -> list[float]:
    """Return Eq. 2 for one group: invalid answers are excluded, and equal rewards give 0."""
    counted = [reward for reward, ok in zip(rewards, valid, strict=True) if ok]
    if len(set(counted)) < 2:
        return [0.0 for _ in rewards]
    mean = math.fsum(counted) / len(counted)
    variance = math.fsum((reward - mean) ** 2 for reward in counted) / (len(counted) - 1)
    return [
        (reward - mean) / (math.sqrt(variance) + eps) if ok else 0.0 for reward, ok in zip(rewards, valid, strict=True)
    ]


def token_kl(policy: torch.Tensor, ref: torch.Tensor) -> torch.Tensor:
    """Return Eq. 5 for one token, from logprobs."""
    ref_over_pi = torch.exp(ref) / torch.exp(policy)
    return ref_over_pi - torch.log(ref_over_pi) - 1


def token_gain(policy: torch.Tensor, old: torch.Tensor, advantage: float, clip_eps: float) -> torch.Tensor:
    """Return the clipped gain of Eq. 4 for one token, from logprobs."""
    ratio = torch.exp(policy) / torch.exp(old)
    if ratio < 1 - clip_eps:
        clipped = torch.tensor(1 - clip_eps, dtype=ratio.dtype)
    elif ratio > 1 + clip_eps:
        clipped = torch.tensor(1 + clip_eps, dtype=ratio.dtype)
    else:
        clipped = ratio
    return ratio * advantage if ratio * advantage <= clipped * advantage else clipped * advantage


@dataclass(frozen=True)
class Answer:
    """One answer: its reward, and three logprobs per token."""

    reward: float
    valid: bool
    policy: list[torch.Tensor]
    old: list[torch.Tensor]
    ref: list[torch.Tensor]


def loss(groups: Sequence[Sequence[Answer]], beta_now: float, clip_eps: float, eps: float) -> torch.Tensor:
    """Return Eq. 4, negated: mean over each answer's tokens, over the valid answers of a group, over groups."""
    objective = torch.zeros((), dtype=torch.float64)
    for group in groups:
        group_advantages = advantages([a.reward for a in group], [a.valid for a in group], eps)
        valid_answers = sum(a.valid for a in group)
        for answer, advantage in zip(group, group_advantages, strict=True):
            if not answer.valid:
                continue
            for policy, old, ref in zip(answer.policy, answer.old, answer.ref, strict=True):
                token = token_gain(policy, old, advantage, clip_eps) - beta_now * token_kl(policy, ref)
                objective = objective + token / len(answer.policy) / valid_answers / len(groups)
    return -objective


def logprob(
    hidden: list[float], lm_head: list[list[float]], target: int, bias: list[float], temperature: float
) -> float:
    """Return the logprob of one target token given one hidden state."""
    logits = [
        (sum(h * w for h, w in zip(hidden, row, strict=True)) + b) / temperature
        for row, b in zip(lm_head, bias, strict=True)
    ]
    largest = max(logits)
    return logits[target] - largest - math.log(sum(math.exp(logit - largest) for logit in logits))


def padded_rows(prompt: list[int], answers: list[list[int]], pad: int) -> tuple[list[list[int]], list[list[bool]]]:
    """Return the padded batch of a group: one row `[prompt | answer | padding]` per answer, and the answer mask."""
    width = len(prompt) + max(len(answer) for answer in answers)
    rows, is_answer = [], []
    for answer in answers:
        padding = width - len(prompt) - len(answer)
        rows.append(prompt + answer + [pad] * padding)
        is_answer.append([False] * len(prompt) + [True] * len(answer) + [False] * padding)
    return rows, is_answer


def sees(segments: list[int], viewer: int, seen: int) -> bool:
    """Return whether one token of a packed sample attends to another (segment 0: prompt, k: answer k)."""
    return seen <= viewer and segments[seen] in (0, segments[viewer])


def predictor(segments: list[int], token: int) -> int:
    """Return the token that precedes this answer token, as if the answer followed the prompt directly."""
    before = [other for other in range(token) if sees(segments, token, other)]
    return before[-1]


def offset(segments: list[int], token: int) -> int:
    """Return the number of earlier tokens of the same answer."""
    return sum(segments[other] == segments[token] for other in range(token))
