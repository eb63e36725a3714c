"""The operations of a training step (generate, score, update, push) over the pools of Ray actors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from othink_ray.engines.base import Sampling
from othink_ray.runtime.futures import collect_spans
from othink_ray.runtime.learner_pool import LearnerPool
from othink_ray.runtime.monitoring import Incidents
from othink_ray.runtime.reward_pool import RewardPool
from othink_ray.runtime.rollout_pool import RolloutPool, SyncEngines
from othink_ray.runtime.weight_sync import AuditedPush
from othink_ray.tracing import Spans, span
from othink_ray.types import Audit, Prompt, ScoredGroup, UpdateRequest, UpdateStats

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
    sync_new_engines: SyncEngines | None = None  # None: the weights of the model folder are the right ones

    def answer_greedily(self, prompts: Sequence[Prompt]) -> list[ScoredGroup]:
        """Return one greedy answer per prompt, scored."""
        return self._answer(prompts, answers=1, temperature=0.0)

    def answer_freely(self, prompts: Sequence[Prompt], answers: int) -> list[ScoredGroup]:
        """Return `answers` sampled answers per prompt, scored."""
        return self._answer(prompts, answers=answers, temperature=self.temperature)

    def _answer(self, prompts: Sequence[Prompt], *, answers: int, temperature: float) -> list[ScoredGroup]:
        sampling = Sampling(answers=answers, max_tokens=self.max_tokens, temperature=temperature, seed=self.seed)
        return self.rewards.score(self.rollout.generate(prompts, sampling, self.sync_new_engines))


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerGroup(EvalWorkers):
    """All pools of a training run: EvalWorkers, plus the learner, the push and the size of a group."""

    learner: LearnerPool
    pusher: AuditedPush
    answers: int  # G

    def generate(self, prompts: Sequence[Prompt], step: int, sampling_round: int = 0) -> Iterator[Any]:
        """Yield references to groups as they finish."""
        sampling = Sampling(
            answers=self.answers,
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            seed=(sampling_round * _SEEDS_PER_ROUND + self.seed) * _STEPS_PER_SEED + step,
        )
        with span("generate", step=step, sampling_round=sampling_round, prompts=len(prompts)):
            yield from self.rollout.generate(prompts, sampling, self.sync_new_engines)

    @span("score")  # includes "generate": the groups are scored as they arrive
    def score(self, groups: Iterable[Any]) -> list[ScoredGroup]:
        return self.rewards.score(groups)

    def record_lengths(self, scored_groups: Sequence[ScoredGroup]) -> None:
        self.rollout.record_lengths(scored.group for scored in scored_groups)

    def sleep(self) -> None:
        self.rollout.sleep()

    def begin_update(self, request: UpdateRequest) -> list[Any]:
        return self.learner.begin_update(request)

    def begin_push(self) -> None:
        self.pusher.begin()

    def prefetch(self, prompts: Sequence[Prompt]) -> None:
        self.rollout.prefetch(prompts, self.answers)

    def prefetch_update(self, request: UpdateRequest) -> None:
        self.learner.prefetch(request)

    @span("update")
    def finish_update(self, update: Sequence[Any]) -> UpdateStats:
        return self.learner.finish_update(update)

    def push(self, version: int) -> Audit:
        with span("push", version=version):
            return self.pusher(version)

    def spans(self, *, keep_recording: bool) -> dict[str, Spans]:
        """Return the trace spans of each process since the last call, by process name."""
        roles = {"rollout": self.rollout.actors, "reward": self.rewards.actors, "learner": self.learner.ranks}
        actors = {f"{role} {index}": actor for role, pool in roles.items() for index, actor in enumerate(pool)}
        return collect_spans(actors, keep_recording=keep_recording)

    def export(self, folder: Path) -> None:
        self.learner.export(folder)

    def save(self, folder: Path) -> None:
        self.learner.save(folder)

    def save_is_written(self) -> bool:
        return self.learner.save_is_written()

    def finish_save(self) -> dict[str, str]:
        return self.learner.finish_save()
