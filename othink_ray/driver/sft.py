"""Supervised training is the same loop: a teacher answers instead of the engines, and each answer is right."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Protocol

import numpy as np

from othink_ray.core.kl import BetaSchedule
from othink_ray.core.packing import LOSS_WEIGHTS, pack_step
from othink_ray.driver.loop import Recipe
from othink_ray.types import Audit, Group, Pack, Prompt, ScoredGroup, UpdateStats

NO_KL = BetaSchedule(name="constant", total=1, beta_min=0.0, beta_max=0.0, explore_frac=0.0, target=1.0, adapt_rate=1.0)


class Teaches(Protocol):
    def generate(self, prompts: Sequence[Prompt], version: int) -> Iterator[Group]: ...


class Learns(Protocol):
    def update(
        self, packs: Sequence[Pack], *, updates: int, beta: float, lr: float, loss: str, correction: str
    ) -> UpdateStats: ...


class Engines(Protocol):
    """A team that can answer, for what supervised training has no verbs of its own."""

    def push(self, version: int) -> Audit: ...

    def answer_greedily(self, prompts: Sequence[Prompt]) -> list[ScoredGroup]: ...

    def sleep(self) -> None:
        """On a GPU that engines share with the learner: leave its memory to the learner until the next push."""
        ...


class Class:
    """A teacher and a learner alone, as a team: there is nobody to push to."""

    def __init__(self, teacher: Teaches, learner: Learns) -> None:
        self.teacher, self.learner = teacher, learner

    def generate(self, prompts: Sequence[Prompt], step: int, sampling_round: int) -> Iterator[Group]:
        return self.teacher.generate(prompts, step)

    def score(self, groups: Iterable[Group]) -> list[ScoredGroup]:
        return [_right(group) for group in groups]

    def update(self, packs: Sequence[Pack], *, updates: int, beta: float, lr: float, stale: bool) -> UpdateStats:
        return self.learner.update(packs, updates=updates, beta=beta, lr=lr, loss="sft", correction="none")

    def push(self, version: int) -> Audit:
        return Audit(version=version, gap_mean=0.0, gap_max=0.0, tokens=0)

    def prepare(self, packs: Sequence[Pack], *, updates: int, with_reference: bool) -> None:
        """No update of a class runs beside anything."""


class ExaminedClass(Class):
    """A class whose skill is measured: the engines get the weights when they are asked, not after each step."""

    def __init__(self, teacher: Teaches, learner: Learns, engines: Engines) -> None:
        super().__init__(teacher, learner)
        self.engines = engines
        self._version = self._pushed = -1

    def push(self, version: int) -> Audit:
        self._version = version
        return super().push(version)

    def update(self, packs: Sequence[Pack], *, updates: int, beta: float, lr: float, stale: bool) -> UpdateStats:
        if self._pushed >= 0:  # awake since an evaluation
            self.engines.sleep()
            self._pushed = -1
        return super().update(packs, updates=updates, beta=beta, lr=lr, stale=stale)

    def answer_greedily(self, prompts: Sequence[Prompt]) -> list[ScoredGroup]:
        if self._pushed != self._version:
            self.engines.push(self._version)
            self._pushed = self._version
        return self.engines.answer_greedily(prompts)


def supervised(batch: int) -> Recipe:
    """Maximum likelihood: every answer weighs the same, and so does every token in it."""
    return Recipe(
        prompts_per_step=batch,
        updates_per_step=1,
        sampling_rounds=1,
        advantages=lambda rewards, valid: np.ones_like(rewards),
        pack=partial(pack_step, updates=1, loss_weights=LOSS_WEIGHTS["answer_mean"], max_tokens=1, shared_prefix=True),
    )


def _right(group: Group) -> ScoredGroup:
    """Worked answers need no score."""
    right = np.ones(len(group.completions))
    return ScoredGroup(group=group, rewards=right, parts={}, valid=right.astype(bool))
