"""Supervised training on worked answers: the same rows, learner and loss weights, with a teacher for a sampler."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np

from othink_ray.core.packing import pack
from othink_ray.driver.loop import Stream
from othink_ray.types import Group, Pack, Prompt, ScoredGroup, UpdateStats


class Teaches(Protocol):
    def generate(self, prompts: Sequence[Prompt]) -> Iterator[Group]: ...


class Learns(Protocol):
    def update(self, packs: Sequence[Pack], *, updates: int, beta: float, loss: str) -> UpdateStats: ...


def supervise(
    teacher: Teaches,
    learner: Learns,
    stream: Stream,
    *,
    steps: range,
    batch: int,
    watch: Callable[[int, UpdateStats], None],
) -> None:
    """Runs `steps` of maximum likelihood; every answer weighs the same, and so does every token in it."""
    for step in steps:
        groups = teacher.generate(stream.take(batch))
        packs = [pack(as_scored(group), np.ones(len(group.completions)), batch) for group in groups]
        watch(step, learner.update(packs, updates=1, beta=0.0, loss="sft"))


def as_scored(group: Group) -> ScoredGroup:
    """Worked answers need no score: each is right."""
    right = np.ones(len(group.completions))
    return ScoredGroup(group=group, rewards=right, parts={}, valid=right.astype(bool))
