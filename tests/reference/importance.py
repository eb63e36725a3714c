"""Slow reference of truncated and masked importance sampling: plain loops, nothing from othink_ray.core."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from tests.reference import variants
from tests.reference.grpo_d import Answer
from tests.reference.variants import Variant

# [group][answer][token]: logprobs under the sampling weights
Samplers = Sequence[Sequence[Sequence[float]]]


def factors(kind: str, old: Sequence[float], sampler: Sequence[float], bounds: tuple[float, float]) -> list[float]:
    """Return the factor on the gain of each token of one answer.

    token and sequence: truncated importance sampling, min(ratio, cap). icepop: the ratio where it lies in [low, cap],
    else 0. mis_token and mis_sequence: masked importance sampling, the ratio where it is at most the cap, else 0.
    """
    low, cap = bounds
    ratios = [math.exp(before) / math.exp(sampled) for before, sampled in zip(old, sampler, strict=True)]
    if kind == "token":
        return [ratio if ratio < cap else cap for ratio in ratios]
    if kind == "icepop":
        return [ratio if low <= ratio <= cap else 0.0 for ratio in ratios]
    if kind == "mis_token":
        return [0.0 if ratio > cap else ratio for ratio in ratios]
    product = 1.0
    for ratio in ratios:
        product = product * ratio
    if kind == "mis_sequence":
        return [0.0 if product > cap else product] * len(ratios)
    assert kind == "sequence"
    return [product if product < cap else cap] * len(ratios)


def loss(
    step: Sequence[Sequence[Answer]],
    samplers: Samplers,
    variant: Variant,
    beta: float,
    max_tokens: int,
    kind: str,
    bounds: tuple[float, float],
) -> torch.Tensor:
    """Return `variants.loss` of one optimizer step, with corrected gains and an unchanged KL."""
    total = torch.zeros((), dtype=torch.float64)
    for g, group in enumerate(step):
        for i, answer in enumerate(group):
            if not answer.valid:
                continue
            adv = variants.advantage(variant.advantage, step, g, i)
            weight = variants.token_weight(variant.weights, step, g, i, max_tokens)
            factor = factors(kind, [float(value) for value in answer.old], samplers[g][i], bounds)
            ratios = variants.ratios(variant.ratio, answer)
            for t, ratio in enumerate(ratios):
                kl = variants.token_kl(variant.estimator, answer.policy[t], answer.ref[t])
                gain = variants.gain(ratio, adv, variant.low, variant.high)
                total = total + weight * (beta * kl - factor[t] * gain)
    return total
