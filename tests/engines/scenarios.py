"""Scenarios for the learner tests: two steps of four small groups, under any settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from othink_ray.config.schema import Config
from othink_ray.core.advantages import group_advantages
from othink_ray.core.packing import pack, plan
from othink_ray.types import Group, Pack
from tests.engines.learner_process import Scenario, Shares
from tests.engines.reference_training import TEMPERATURE
from tests.engines.samples import scored

BETA = 0.1
REWARDS = ([2.0, 0.0, 1.0], [1.0, 1.0, 1.0], [0.0, 2.0, 0.0], [1.0, 0.0, 0.0])
SMALL = (
    "model.tiny.text_width=64",
    "model.tiny.kv_heads=1",
    "model.tiny.text_layers=2",
    "model.tiny.vision_width=32",
    "model.tiny.vision_layers=1",
    "learner.lr=2e-3",
    "learner.adam_eps=1e-4",  # damps rounding noise, so that runs can be compared tightly
    "learner.weight_decay=0.1",
    "learner.micro_tokens=400",
    "learner.threads=1",
    "learner.zero_stage=1",
)


def packs_of(groups: Sequence[Group], updates: int) -> list[Pack]:
    return [
        pack(scored(group, rewards), group_advantages(np.array(rewards)), len(groups) // updates)
        for group, rewards in zip(groups, REWARDS, strict=True)
    ]


def planned(groups: Sequence[Group], *, ranks: int, updates: int, micro_tokens: int) -> Shares:
    packs = packs_of(groups, updates)
    by_update = plan(packs, ranks=ranks, updates=updates, micro_tokens=micro_tokens)
    return [
        [[[packs[index] for index in micro] for micro in update[rank]] for update in by_update] for rank in range(ranks)
    ]


def training(small: Config, batches: list[list[Group]], ranks: int, **changes: object) -> Scenario:
    """Return a scenario of two steps of two updates, with changed learner settings."""
    learner = replace(small.learner, world_size=ranks, **changes)  # type: ignore[arg-type]
    steps = [planned(groups, ranks=ranks, updates=2, micro_tokens=learner.micro_tokens) for groups in batches]
    return Scenario(learner=learner, steps=steps, beta=BETA, temperature=TEMPERATURE)
