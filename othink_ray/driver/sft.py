"""Supervised fine-tuning in the same loop: demonstrations replace sampled answers, and each counts as correct."""

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


class DemonstrationSource(Protocol):
    """Yields one group with a worked answer for each prompt."""

    def generate(self, prompts: Sequence[Prompt], version: int) -> Iterator[Group]: ...


class SFTLearner(Protocol):
    """The learner's update, as SFT calls it."""

    def update(
        self, packs: Sequence[Pack], *, updates: int, beta: float, lr: float, loss: str, correction: str
    ) -> UpdateStats: ...


class EvalEngines(Protocol):
    """Rollout engines that SFT uses for evaluation only."""

    def push(self, version: int) -> Audit: ...

    def answer_greedily(self, prompts: Sequence[Prompt]) -> list[ScoredGroup]: ...

    def sleep(self) -> None:
        """On a GPU shared with the learner, free the engines' memory until the next push."""
        ...


class SFTWorkers:
    """`loop.Workers` of demonstrations and a learner, without engines: `push` sends nothing."""

    def __init__(self, demonstrations: DemonstrationSource, learner: SFTLearner) -> None:
        self.demonstrations, self.learner = demonstrations, learner

    def generate(self, prompts: Sequence[Prompt], step: int, sampling_round: int) -> Iterator[Group]:
        return self.demonstrations.generate(prompts, step)

    def score(self, groups: Iterable[Group]) -> list[ScoredGroup]:
        return [_all_correct(group) for group in groups]

    def update(self, packs: Sequence[Pack], *, updates: int, beta: float, lr: float, stale: bool) -> UpdateStats:
        return self.learner.update(packs, updates=updates, beta=beta, lr=lr, loss="sft", correction="none")

    def push(self, version: int) -> Audit:
        return Audit(version=version, gap_mean=0.0, gap_max=0.0, tokens=0)

    def prepare(self, packs: Sequence[Pack], *, updates: int, with_reference: bool) -> None:
        """Do nothing: no SFT update is overlapped."""


class EvaluatedSFTWorkers(SFTWorkers):
    """SFT workers with engines for evaluation, which get the weights before an evaluation, not after each step."""

    def __init__(self, demonstrations: DemonstrationSource, learner: SFTLearner, engines: EvalEngines) -> None:
        super().__init__(demonstrations, learner)
        self.engines = engines
        self._version = self._pushed = -1

    def push(self, version: int) -> Audit:
        self._version = version
        return super().push(version)

    def update(self, packs: Sequence[Pack], *, updates: int, beta: float, lr: float, stale: bool) -> UpdateStats:
        if self._pushed >= 0:  # the engines are awake since an evaluation
            self.engines.sleep()
            self._pushed = -1
        return super().update(packs, updates=updates, beta=beta, lr=lr, stale=stale)

    def answer_greedily(self, prompts: Sequence[Prompt]) -> list[ScoredGroup]:
        if self._pushed != self._version:
            self.engines.push(self._version)
            self._pushed = self._version
        return self.engines.answer_greedily(prompts)


def sft_recipe(batch_size: int) -> Recipe:
    """Return the recipe of maximum likelihood: all answers weigh the same, and so do all tokens of an answer."""
    return Recipe(
        prompts_per_step=batch_size,
        updates_per_step=1,
        sampling_rounds=1,
        advantages=lambda rewards, valid: np.ones_like(rewards),
        pack=partial(pack_step, updates=1, loss_weights=LOSS_WEIGHTS["answer_mean"], max_tokens=1, shared_prefix=True),
    )


def _all_correct(group: Group) -> ScoredGroup:
    """Give every demonstration a reward of 1; worked answers are not graded."""
    rewards = np.ones(len(group.completions))
    return ScoredGroup(group=group, rewards=rewards, parts={}, valid=rewards.astype(bool))
