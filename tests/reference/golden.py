"""Golden numbers: one small step and the results of every variant on it, computed once by the slow reference.

`python -m tests.reference.golden` regenerates them; a change in golden.json is a change in the math.
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import torch

from tests.reference import grpo_d, variants
from tests.reference.variants import Variant

FILE = Path(__file__).with_suffix(".json")

BETA, MAX_TOKENS, UPDATES = 0.05, 6, 2

VARIANTS = {
    "grpo": Variant("group_std", "grpo", "answer_mean", "k3", 0.2, 0.2),
    "grpo_d": Variant("group_std", "grpo", "answer_mean", "k3", 0.2, 0.2),
    "dr_grpo": Variant("group_mean", "grpo", "constant_length", "k3", 0.2, 0.2),
    "dapo": Variant("group_std", "grpo", "token_mean", "k3", 0.2, 0.28),
    "gspo": Variant("group_std", "gspo", "answer_mean", "k3", 3e-4, 4e-4),
    "rloo": Variant("leave_one_out", "grpo", "constant_length", "k2", 0.2, 0.2),
    "reinforce_pp": Variant("batch_std", "grpo", "token_mean", "k2", 0.2, 0.2),
    # not in conf/: an unclipped answer ratio, and the third estimator
    "gspo, wide": Variant("group_mean", "gspo", "token_mean", "k1", 0.3, 0.4),
}

PAIRS = [(-0.1, -0.1), (-0.5, -2.0), (-2.0, -0.5), (-7.0, -0.01), (-0.01, -7.0)]
CURVE = {"total": 10, "beta_min": 0.04, "beta_max": 0.1, "explore_frac": 0.3}
CURVES = ("paper", "linear", "cosine", "exponential", "constant")
ADAPTIVE = {"beta_min": 0.04, "beta_max": 0.1, "target": 0.01, "adapt_rate": 0.5}
KLS = [0.0, 0.004, 0.009, 0.0105, 0.02, 0.5, 0.5, 0.5, 0.5, 0.5, 0.0]
ACCURACIES = [0.25, 0.5, 0.5, 0.75, 1.0, 0.0]


def step() -> list[list[dict[str, Any]]]:
    """Return four groups of three ragged answers, among them an empty one, an invalid one, and equal rewards."""
    rng = random.Random(5)
    lengths = [[3, 1, 4], [2, 0, 5], [1, 2, 3], [6, 2, 2]]
    rewards = [[2.0, 0.0, 1.0], [1.0, 0.0, 1.0], [1.0, 1.0, 1.0], [0.0, 2.0, 0.0]]
    groups = []
    for g in range(4):
        group = []
        for i in range(3):
            old = [round(-3 * rng.random(), 3) for _ in range(lengths[g][i])]
            policy = [round(value + rng.gauss(0, 0.25), 3) for value in old]
            ref = [round(value + rng.gauss(0, 0.25), 3) for value in old]
            valid = (g, i) != (3, 2)
            group.append({"reward": rewards[g][i], "valid": valid, "policy": policy, "old": old, "ref": ref})
        groups.append(group)
    return groups


def answers(groups: list[list[dict[str, Any]]]) -> list[list[grpo_d.Answer]]:
    """Return the step as inputs of the slow reference; policy logprobs are leaves."""

    def scalars(values: list[float]) -> list[torch.Tensor]:
        return [torch.tensor(value, dtype=torch.float64) for value in values]

    return [
        [
            grpo_d.Answer(
                reward=answer["reward"],
                valid=answer["valid"],
                policy=[value.requires_grad_() for value in scalars(answer["policy"])],
                old=scalars(answer["old"]),
                ref=scalars(answer["ref"]),
            )
            for answer in group
        ]
        for group in groups
    ]


def of_variant(groups: list[list[dict[str, Any]]], variant: Variant) -> dict[str, Any]:
    """Return advantages by group and answer, the loss of each update, and the gradient for every answer token, flat."""
    step_answers = answers(groups)
    losses = variants.loss(step_answers, variant, BETA, MAX_TOKENS, UPDATES)
    leaves = [token for group in step_answers for answer in group for token in answer.policy]
    gradient = torch.autograd.grad(torch.stack(losses).sum(), leaves, allow_unused=True)
    return {
        "advantages": [
            [variants.advantage(variant.advantage, step_answers, g, i) for i in range(3)]
            for g in range(len(step_answers))
        ],
        "losses": [float(value.detach()) for value in losses],
        "gradient": [0.0 if value is None else float(value) for value in gradient],
    }


def of_estimator(kind: str) -> list[list[float]]:
    """Return the value and its gradient with respect to the policy logprob, for each (policy, ref) of PAIRS."""
    found = []
    for policy, ref in PAIRS:
        leaf = torch.tensor(policy, dtype=torch.float64, requires_grad=True)
        value = variants.token_kl(kind, leaf, torch.tensor(ref, dtype=torch.float64))
        found.append([float(value.detach()), float(torch.autograd.grad(value, leaf)[0])])
    return found


def curve(name: str) -> list[float]:
    """Return beta at steps 0 to 11 of 10."""
    low, high = CURVE["beta_min"], CURVE["beta_max"]
    if name == "paper":
        return [grpo_d.beta(s, 10, low, high, CURVE["explore_frac"]) for s in range(12)]
    progress = [min(s, 10) / 10 for s in range(12)]
    if name == "linear":
        return [low * (1 - share) + high * share for share in progress]
    if name == "cosine":
        return [(low + high) / 2 - (high - low) / 2 * math.cos(math.pi * share) for share in progress]
    if name == "exponential":
        return [low ** (1 - share) * high**share for share in progress]
    assert name == "constant"
    return [low] * 12


def golden_numbers() -> dict[str, Any]:
    groups = step()
    return {
        "step": groups,
        "variants": {name: of_variant(groups, variant) for name, variant in VARIANTS.items()},
        "estimators": {kind: of_estimator(kind) for kind in ("k1", "k2", "k3")},
        "schedules": {name: curve(name) for name in CURVES},
        "target": variants.betas_of_target(KLS, **ADAPTIVE),
        "accuracy": variants.betas_of_accuracy(
            ACCURACIES, ADAPTIVE["beta_min"], ADAPTIVE["beta_max"], ADAPTIVE["adapt_rate"]
        ),
    }


if __name__ == "__main__":
    FILE.write_text(json.dumps(golden_numbers(), indent=1) + "\n")
