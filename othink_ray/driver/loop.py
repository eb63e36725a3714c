"""GRPO-D as the paper writes it. Everything that is distributed, slow or may fail is behind four verbs.

generate -> score -> update -> push          (one turn is one training step, on-policy)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from othink_ray.core.advantages import group_advantages
from othink_ray.core.packing import pack
from othink_ray.driver.clock import Clock
from othink_ray.types import Audit, Pack, Prompt, ScoredGroup, UpdateStats


class Stream(Protocol):
    def take(self, count: int) -> list[Prompt]: ...


class Team(Protocol):
    """The four verbs."""

    def generate(self, prompts: Sequence[Prompt], step: int) -> Iterator[Any]:
        """Groups, or references to them, as they finish."""
        ...

    def score(self, groups: Iterable[Any]) -> list[ScoredGroup]: ...

    def update(self, packs: Sequence[Pack], *, updates: int, beta: float) -> UpdateStats: ...

    def push(self, version: int) -> Audit:
        """Returns when every engine has the version and answers like the learner."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """All that one step showed, for those who watch."""

    step: int
    beta: float
    scored: Sequence[ScoredGroup]
    advantages: Sequence[NDArray[np.float64]]
    stats: UpdateStats
    audit: Audit
    times: dict[str, float]


class Watches(Protocol):
    """Sees a run go by."""

    def begin(self, step: int) -> None:
        """All engines have the weights after `step` steps."""
        ...

    def step(self, seen: Step) -> None: ...


def train(
    team: Team,
    stream: Stream,
    *,
    steps: range,
    prompts_per_step: int,
    updates_per_step: int,
    schedule: Callable[[int], float],
    journal: Watches,
) -> None:
    """Runs `steps`; the journal sees each one when it is done: it logs, evaluates and saves."""
    team.push(steps.start)
    journal.begin(steps.start)
    for step in steps:
        clock = Clock()
        beta = schedule(step)
        prompts = stream.take(prompts_per_step)
        groups = clock.lap_at_end("generate", team.generate(prompts, step))
        scored = in_order(team.score(groups), prompts)
        clock.lap("score")
        assert all(one.group.version == step for one in scored), "sampled with other weights than those being trained"
        advantages = [group_advantages(one.rewards, one.valid) for one in scored]
        share = prompts_per_step // updates_per_step
        packs = [pack(one, own, share) for one, own in zip(scored, advantages, strict=True)]
        stats = team.update(packs, updates=updates_per_step, beta=beta)
        clock.lap("update")
        audit = team.push(step + 1)
        clock.lap("push")
        journal.step(
            Step(
                step=step,
                beta=beta,
                scored=scored,
                advantages=advantages,
                stats=stats,
                audit=audit,
                times=clock.times,
            )
        )


def in_order(scored: Sequence[ScoredGroup], prompts: Sequence[Prompt]) -> list[ScoredGroup]:
    """As the prompts were asked: a run must not depend on which engine was quicker."""
    by_id = {one.group.prompt.id: one for one in scored}
    return [by_id[prompt.id] for prompt in prompts]
