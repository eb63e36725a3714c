"""The four verbs over the pools: what the driver's loop talks to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from othink_ray.engines.base import Sampling
from othink_ray.runtime.pools import LearnerPool, RewardPool, RolloutPool
from othink_ray.runtime.push import AuditedPush
from othink_ray.types import Audit, Pack, Prompt, ScoredGroup, UpdateStats

_STEPS_PER_SEED = 2**24  # no two runs of neighbouring seeds share a step's seed


@dataclass(frozen=True, slots=True, kw_only=True)
class Team:
    """Rollout, reward and learner pools of one run, with its way of sampling."""

    rollout: RolloutPool
    rewards: RewardPool
    learner: LearnerPool
    pusher: AuditedPush
    answers: int
    max_tokens: int
    temperature: float
    seed: int
    loss: str

    def generate(self, prompts: Sequence[Prompt], step: int) -> Iterator[Any]:
        sampling = Sampling(
            answers=self.answers,
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            seed=self.seed * _STEPS_PER_SEED + step,
        )
        return self.rollout.generate(prompts, sampling)

    def score(self, groups: Iterable[Any]) -> list[ScoredGroup]:
        return self.rewards.score(groups)

    def update(self, packs: Sequence[Pack], *, updates: int, beta: float) -> UpdateStats:
        return self.learner.update(packs, updates=updates, beta=beta, loss=self.loss)

    def push(self, version: int) -> Audit:
        return self.pusher(version)

    def answer_greedily(self, prompts: Sequence[Prompt]) -> list[ScoredGroup]:
        """One greedy answer a prompt, scored: an evaluation's raw material."""
        greedy = Sampling(answers=1, max_tokens=self.max_tokens, temperature=0.0, seed=0)
        return self.rewards.score(self.rollout.generate(prompts, greedy))

    def export(self, folder: Path) -> None:
        self.learner.export(folder)

    def save(self, folder: Path) -> None:
        self.learner.save(folder)
