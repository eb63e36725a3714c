"""The loop's verbs (generate, score, update, push) over the pools of Ray actors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from othink_ray.engines.base import Sampling
from othink_ray.runtime.futures import collect_spans
from othink_ray.runtime.learner_pool import LearnerPool
from othink_ray.runtime.monitoring import Incidents
from othink_ray.runtime.reward_pool import RewardPool
from othink_ray.runtime.rollout_pool import RolloutPool
from othink_ray.runtime.weight_sync import AuditedPush
from othink_ray.tracing import Spans
from othink_ray.types import Audit, Pack, Prompt, ScoredGroup, UpdateStats

_STEPS_PER_SEED = 2**24  # runs with neighboring seeds share no step's seed
_SEEDS_PER_ROUND = 2**64  # torch's range of seeds: seeds of different sampling rounds never meet


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalWorkers:
    """Rollout and reward pools, which sample and score answers with the weights that the engines hold."""

    rollout: RolloutPool
    rewards: RewardPool
    incidents: Incidents
    max_tokens: int
    temperature: float
    seed: int

    def answer_greedily(self, prompts: Sequence[Prompt]) -> list[ScoredGroup]:
        """Return one greedy answer per prompt, scored."""
        return self._answer(prompts, answers=1, temperature=0.0)

    def answer_freely(self, prompts: Sequence[Prompt], answers: int) -> list[ScoredGroup]:
        """Return `answers` sampled answers per prompt, scored."""
        return self._answer(prompts, answers=answers, temperature=self.temperature)

    def _answer(self, prompts: Sequence[Prompt], *, answers: int, temperature: float) -> list[ScoredGroup]:
        sampling = Sampling(answers=answers, max_tokens=self.max_tokens, temperature=temperature, seed=self.seed)
        return self.rewards.score(self.rollout.generate(prompts, sampling))


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerGroup(EvalWorkers):
    """All pools of a training run: EvalWorkers, plus the learner, the push and the sampling settings."""

    learner: LearnerPool
    pusher: AuditedPush
    answers: int
    loss: str
    correction: str  # importance correction for answers of the current weights: the engines round differently
    stale_correction: str  # importance correction for answers of older weights
    upcoming: Callable[[], Sequence[Prompt]]  # the next prompts, as far as they are known

    def generate(self, prompts: Sequence[Prompt], step: int, sampling_round: int = 0) -> Iterator[Any]:
        """Yield references to groups as they finish; prefetch the upcoming prompts after half of them.

        By then the upcoming prompts are read; an engine begins with its share after its last answer.
        """
        sampling = Sampling(
            answers=self.answers,
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            seed=(sampling_round * _SEEDS_PER_ROUND + self.seed) * _STEPS_PER_SEED + step,
        )
        groups = self.rollout.generate(prompts, sampling)
        yield from islice(groups, (len(prompts) + 1) // 2)
        self.rollout.prefetch(self.upcoming(), self.answers)
        yield from groups

    def score(self, groups: Iterable[Any]) -> list[ScoredGroup]:
        scored = self.rewards.score(groups)
        self.rollout.note(result.group for result in scored)
        return scored

    def update(self, packs: Sequence[Pack], *, updates: int, beta: float, lr: float, stale: bool) -> UpdateStats:
        """Run the optimizer steps and return their statistics; the gather for the next push is queued behind them."""
        self.rollout.sleep()
        correction = self.stale_correction if stale else self.correction
        begun = self.learner.begin_update(
            packs, updates=updates, beta=beta, lr=lr, loss=self.loss, correction=correction
        )
        self.pusher.begin()
        return self.learner.updated(begun)

    def sleep(self) -> None:
        self.rollout.sleep()

    def prepare(self, packs: Sequence[Pack], *, updates: int, with_reference: bool) -> None:
        self.learner.prepare(packs, updates=updates, with_reference=with_reference)

    def push(self, version: int) -> Audit:
        return self.pusher(version)

    def spans(self, *, keep_recording: bool) -> dict[str, Spans]:
        """Return the trace spans of each process since the last call, by its name."""
        roles = {"rollout": self.rollout.actors, "reward": self.rewards.actors, "learner": self.learner.ranks}
        actors = {f"{role} {index}": actor for role, pool in roles.items() for index, actor in enumerate(pool)}
        return collect_spans(actors, keep_recording=keep_recording)

    def export(self, folder: Path) -> None:
        self.learner.export(folder)

    def save(self, folder: Path) -> None:
        self.learner.save(folder)

    def written(self) -> bool:
        return self.learner.written()

    def saved(self) -> dict[str, str]:
        return self.learner.saved()
