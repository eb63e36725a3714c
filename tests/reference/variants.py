"""Slow reference of the GRPO variants: plain loops over groups, answers, tokens; nothing shared with othink_ray.core.

In order: advantages, token weights, the KL of a token, ratios, the loss of one optimizer step, and the adaptive KL
schedules.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tests.reference.grpo_d import Answer

EPS = 1e-8


@dataclass(frozen=True)
class Variant:
    """One algorithm, as a choice of the parts below."""

    advantage: str
    ratio: str  # grpo: per token, gspo: per answer
    weights: str
    estimator: str
    low: float
    high: float


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def std(values: Sequence[float]) -> float:
    """Return the sample standard deviation (n - 1)."""
    middle = mean(values)
    return math.sqrt(math.fsum((value - middle) ** 2 for value in values) / (len(values) - 1))


def advantage(kind: str, groups: Sequence[Sequence[Answer]], g: int, i: int) -> float:
    """Return the advantage of answer i of group g; 0 if i is invalid, or the group's valid rewards are equal."""
    rewards = [a.reward for a in groups[g] if a.valid]
    if not groups[g][i].valid or len(set(rewards)) < 2:
        return 0.0
    reward = groups[g][i].reward
    if kind == "group_std":
        return (reward - mean(rewards)) / (std(rewards) + EPS)
    if kind == "group_mean":
        return reward - mean(rewards)
    if kind == "leave_one_out":
        others = [a.reward for j, a in enumerate(groups[g]) if a.valid and j != i]
        return reward - mean(others)
    assert kind == "batch_std"
    deviations = []
    for group in groups:
        valid = [a.reward for a in group if a.valid]
        deviations += [value - mean(valid) if len(set(valid)) > 1 else 0.0 for value in valid]
    return (reward - mean(rewards)) / (std(deviations) + EPS)


def token_weight(kind: str, groups: Sequence[Sequence[Answer]], g: int, i: int, max_tokens: int) -> float:
    """Return the weight of each token of answer i of group g in the loss of an optimizer step over `groups`."""
    if not groups[g][i].valid or not groups[g][i].policy:
        return 0.0
    answers = sum(a.valid for a in groups[g])
    if kind == "answer_mean":
        return 1 / len(groups[g][i].policy) / answers / len(groups)
    if kind == "token_mean":
        return 1 / sum(len(a.policy) for group in groups for a in group if a.valid)
    assert kind == "constant_length"
    return 1 / max_tokens / answers / len(groups)


def token_kl(kind: str, policy: torch.Tensor, ref: torch.Tensor) -> torch.Tensor:
    """Return the KL estimate of one token, from logprobs."""
    ratio = torch.exp(policy) / torch.exp(ref)
    if kind == "k1":
        return torch.log(ratio)
    if kind == "k2":
        return torch.log(ratio) ** 2 / 2
    assert kind == "k3"
    return 1 / ratio - torch.log(1 / ratio) - 1


def ratios(kind: str, answer: Answer) -> list[torch.Tensor]:
    """Return pi / old of each token of an answer; for gspo, the n-th root of their product for all tokens."""
    each = [torch.exp(policy) / torch.exp(old) for policy, old in zip(answer.policy, answer.old, strict=True)]
    if kind == "grpo" or not each:
        return each
    assert kind == "gspo"
    product = torch.ones((), dtype=torch.float64)
    for ratio in each:
        product = product * ratio
    return [product ** (1 / len(each))] * len(each)


def gain(ratio: torch.Tensor, adv: float, low: float, high: float) -> torch.Tensor:
    """Return min(ratio * A, clip(ratio) * A)."""
    clipped = ratio
    if ratio < 1 - low:
        clipped = torch.tensor(1 - low, dtype=ratio.dtype)
    elif ratio > 1 + high:
        clipped = torch.tensor(1 + high, dtype=ratio.dtype)
    return ratio * adv if ratio * adv <= clipped * adv else clipped * adv


def loss(
    step: Sequence[Sequence[Answer]], variant: Variant, beta: float, max_tokens: int, updates: int = 1
) -> list[torch.Tensor]:
    """Return the loss of each optimizer step; advantages use the whole step, weights only their own update."""
    losses = []
    share = len(step) // updates
    for update in range(updates):
        groups = step[update * share : (update + 1) * share]
        total = torch.zeros((), dtype=torch.float64)
        for g, group in enumerate(groups):
            for i, answer in enumerate(group):
                if not answer.valid:
                    continue
                adv = advantage(variant.advantage, step, update * share + g, i)
                weight = token_weight(variant.weights, groups, g, i, max_tokens)
                for ratio, policy, ref in zip(ratios(variant.ratio, answer), answer.policy, answer.ref, strict=True):
                    kl = token_kl(variant.estimator, policy, ref)
                    total = total + weight * (beta * kl - gain(ratio, adv, variant.low, variant.high))
        losses.append(total)
    return losses


def betas_of_target(
    kls: Sequence[float], beta_min: float, beta_max: float, target: float, adapt_rate: float
) -> list[float]:
    """Return beta before each of the steps that measured `kls`, and after the last one."""
    betas = [(beta_min + beta_max) / 2]
    for kl in kls:
        beta = betas[-1]
        if not math.isnan(kl):
            error = kl / target - 1
            if error > 0.2:
                error = 0.2
            if error < -0.2:
                error = -0.2
            beta = beta * (1 + adapt_rate * error)
            if beta < beta_min:
                beta = beta_min
            if beta > beta_max:
                beta = beta_max
        betas.append(beta)
    return betas


def betas_of_accuracy(accuracies: Sequence[float], beta_min: float, beta_max: float, adapt_rate: float) -> list[float]:
    """Return beta before each of the steps that measured `accuracies`, and after the last one."""
    running = 0.0
    betas = [beta_min]
    for accuracy in accuracies:
        if not math.isnan(accuracy):
            running = (1 - adapt_rate) * running + adapt_rate * accuracy
        betas.append(beta_min * (1 - running) + beta_max * running)
    return betas
