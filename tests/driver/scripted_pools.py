"""Fakes for the real WorkerGroup: pools whose answers depend only on seed and prompt."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from othink_ray.core.packing import plan
from othink_ray.engines.base import Sampling
from othink_ray.runtime.worker_group import WorkerGroup
from othink_ray.types import Audit, Completion, Group, Prompt, ScoredGroup, UpdateRequest
from tests.driver.fakes import stats_of


@dataclass
class ScriptedPools:
    """Rollout pool, reward pool, learner pool and pusher in one; `signal` is the chance that rewards differ."""

    signal: float
    version: int = -1
    seeds: list[int] = field(default_factory=list)  # of all groups, in request order
    update_weights: list[list[float]] = field(default_factory=list)  # by step: weight of each optimizer step

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, sync: object) -> Iterator[Group]:
        for prompt in prompts:
            self.seeds.append(sampling.seed_of(prompt))
            rng = np.random.default_rng(self.seeds[-1])
            answers = tuple(
                Completion(
                    token_ids=rng.integers(0, 10**6, length),
                    sampler_logprobs=np.zeros(length, np.float32),
                    text="",
                    finish="stop",
                )
                for length in rng.integers(1, 6, 3)
            )
            ids = np.arange(2)
            yield Group(prompt=prompt, prompt_token_ids=ids, completions=answers, version=self.version)

    def score(self, groups: Iterable[Group]) -> list[ScoredGroup]:
        scored = []
        for group in reversed(list(groups)):
            rng = np.random.default_rng(group.completions[0].token_ids)
            rewards = np.arange(3.0) * (rng.random() < self.signal)
            scored.append(ScoredGroup(group=group, rewards=rewards, parts={}, valid=np.ones(3, dtype=np.bool_)))
        return scored

    def begin_update(self, request: UpdateRequest) -> None:
        packs = request.packs
        planned = plan(packs, ranks=2, updates=request.updates, micro_tokens=24)
        indices = [[index for rank in update for micro_batch in rank for index in micro_batch] for update in planned]
        weights = [sum(float(packs[index].loss_weights.sum()) for index in update) for update in indices]
        self.update_weights.append(weights)

    def finish_update(self, begun: None) -> Any:
        return stats_of()

    def __call__(self, version: int) -> Audit:
        self.version = version
        return Audit(version=version, gap_mean=0.0, gap_max=0.0, tokens=1)

    def prefetch(self, prompts: Sequence[Prompt], answers: int) -> None: ...

    def record_lengths(self, groups: Iterable[Group]) -> None: ...

    def sleep(self) -> None: ...

    def begin(self) -> None: ...


def worker_group(pools: ScriptedPools) -> WorkerGroup:
    """Return a WorkerGroup over scripted pools."""
    pool: Any = pools
    return WorkerGroup(
        rollout=pool,
        rewards=pool,
        incidents=pool,
        learner=pool,
        pusher=pool,
        max_tokens=8,
        temperature=1.0,
        seed=5,
        answers=3,
    )
