"""GRPO-D from `tests/reference` on a real network: one padded row per answer, loops over tokens, torch's AdamW."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from othink_ray.config.schema import LearnerConfig
from othink_ray.core.advantages import EPS
from othink_ray.families.base import Family
from othink_ray.types import Group
from tests.engines.padded_reference import plain_logprobs
from tests.engines.samples import fresh_policy
from tests.reference import grpo_d
from tests.reference import importance as importance
from tests.reference.variants import Variant

TEMPERATURE, CLIP_EPS = 0.9, 0.2
TIS_BOUNDS = 0.5, 1.0
GRPO = Variant("group_std", "grpo", "answer_mean", "k3", CLIP_EPS, CLIP_EPS)

# [group][answer]
Rewards = Sequence[Sequence[float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Slow:
    """Results of the paper's formulas; losses and gradient norms are means over the updates of a step."""

    losses: list[float]
    grad_norms: list[float]
    weights: dict[str, NDArray[np.float32]]
    first_gradient: dict[str, NDArray[np.float32]]


def answers_of(flat: Tensor, group: Group) -> list[list[Tensor]]:
    return [list(part) for part in flat.split([len(c.token_ids) for c in group.completions])]


def slow_training(
    learner: LearnerConfig,
    family: Family,
    batches: Sequence[Sequence[Group]],
    rewards: Rewards,
    *,
    updates: int,
    beta: float,
    tis: str = "none",
) -> Slow:
    """Train one step per batch; its groups are divided among `updates` in order."""
    policy, reference = fresh_policy(family, TEMPERATURE), fresh_policy(family, TEMPERATURE)
    optimizer = torch.optim.AdamW(
        policy.parameters(),
        lr=learner.lr,
        betas=(learner.adam_beta1, learner.adam_beta2),
        eps=learner.adam_eps,
        weight_decay=learner.weight_decay,
    )
    losses: list[float] = []
    grad_norms: list[float] = []
    first_gradient: dict[str, NDArray[np.float32]] = {}
    for groups in batches:
        with torch.no_grad():
            old = [answers_of(plain_logprobs(policy, family, [group]), group) for group in groups]
            ref = [answers_of(plain_logprobs(reference, family, [group]), group) for group in groups]
        step_losses, step_norms, share = [], [], len(groups) // updates
        for update in range(updates):
            slow_groups = []
            for i in range(update * share, (update + 1) * share):
                policy_answers = answers_of(plain_logprobs(policy, family, [groups[i]]), groups[i])
                slow_groups.append(
                    [
                        grpo_d.Answer(reward=reward, valid=True, policy=p, old=o, ref=r)
                        for reward, p, o, r in zip(rewards[i], policy_answers, old[i], ref[i], strict=True)
                    ]
                )
            if tis == "none":
                value = grpo_d.loss(slow_groups, beta, CLIP_EPS, EPS)
            else:
                sample_groups = groups[update * share : (update + 1) * share]
                samplers = [
                    [list(map(float, c.sampler_logprobs)) for c in group.completions] for group in sample_groups
                ]
                value = importance.loss(slow_groups, samplers, GRPO, beta, 1, tis, TIS_BOUNDS)
            optimizer.zero_grad()
            value.backward()
            if not first_gradient:
                first_gradient = {
                    n: p.grad.numpy().copy() for n, p in policy.network.named_parameters() if p.grad is not None
                }
            step_norms.append(float(torch.nn.utils.clip_grad_norm_(policy.parameters(), learner.max_grad_norm)))
            optimizer.step()
            step_losses.append(float(value.detach()))
        losses.append(fmean(step_losses))
        grad_norms.append(fmean(step_norms))
    weights = {name: p.detach().numpy().copy() for name, p in policy.network.named_parameters()}
    return Slow(losses=losses, grad_norms=grad_norms, weights=weights, first_gradient=first_gradient)
