"""GRPO-D as the paper writes it. Everything that is distributed, slow or may fail is behind four verbs.

generate -> score -> update -> push          (one turn is one training step, on-policy; overlap.py samples ahead)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from othink_ray.core.advantages import Advantages, rewards_differ
from othink_ray.core.kl import BetaSchedule, Measured
from othink_ray.tracing import Clock
from othink_ray.types import Audit, Pack, Prompt, ScoredGroup, UpdateStats


class Stream(Protocol):
    @property
    def position(self) -> int:
        """Where the next question begins."""
        ...

    def take(self, count: int, beside: Sequence[Prompt]) -> list[Prompt]:
        """The next questions, with ids that differ from each other and from those of `beside`."""
        ...


class Workers(Protocol):
    """The four verbs, and a hint that they go without."""

    def generate(self, prompts: Sequence[Prompt], step: int, sampling_round: int) -> Iterator[Any]:
        """Groups, or references to them, as they finish; each round of a step has random seeds of its own."""
        ...

    def score(self, groups: Iterable[Any]) -> list[ScoredGroup]: ...

    def update(self, packs: Sequence[Pack], *, updates: int, beta: float, lr: float, stale: bool) -> UpdateStats:
        """`stale`: older weights than those being trained sampled the answers."""
        ...

    def push(self, version: int) -> Audit:
        """Returns when every engine has the version and answers like the learner."""
        ...

    def prepare(self, packs: Sequence[Pack], *, updates: int, with_reference: bool) -> None:
        """The update after the one that runs will be of `packs`. Returns at once."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What tells one algorithm of the family from another, between the answers and the learner."""

    prompts_per_step: int
    updates_per_step: int
    sampling_rounds: int
    advantages: Advantages
    pack: Callable[[Sequence[ScoredGroup], Sequence[NDArray[np.float64]]], list[Pack]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """The groups of one step, in the order of asking: all of them, and those that are trained."""

    requested: Sequence[ScoredGroup]
    trained: Sequence[ScoredGroup]


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """All that one step showed, for those who watch."""

    step: int
    beta: float
    schedule_state: Mapping[str, float]  # for the step after this one
    data_position: int  # where the questions of that step begin
    requested: Sequence[ScoredGroup]
    scored: Sequence[ScoredGroup]  # those of them that were trained
    advantages: Sequence[NDArray[np.float64]]  # of `scored`
    stats: UpdateStats
    audit: Audit
    times: dict[str, float]
    hidden_s: float  # of sampling for the step after this one, while this one was learned


class Callbacks(Protocol):
    """Sees a run go by."""

    def begin(self, step: int) -> None:
        """All engines have the weights after `step` steps."""
        ...

    def step(self, seen: Step) -> None: ...


def train(
    team: Workers,
    stream: Stream,
    *,
    steps: range,
    recipe: Recipe,
    schedule: BetaSchedule,
    schedule_state: Mapping[str, float],
    lr: Callable[[int], float],
    journal: Callbacks,
) -> None:
    """Runs `steps`; the journal sees each one when it is done: it logs, evaluates and saves."""
    team.push(steps.start)
    journal.begin(steps.start)
    for step in steps:
        clock = Clock()
        beta = schedule.beta(step, schedule_state)
        sampled = sample(team, stream, recipe, clock, step=step, version=step)
        advantages = compared(sampled.trained, recipe)
        packs = recipe.pack(sampled.trained, advantages)
        stats = team.update(packs, updates=recipe.updates_per_step, beta=beta, lr=lr(step), stale=False)
        clock.lap("update")
        audit = team.push(step + 1)
        clock.lap("push")
        schedule_state = schedule.after(schedule_state, measured(sampled, stats))
        journal.step(
            Step(
                step=step,
                beta=beta,
                schedule_state=schedule_state,
                data_position=stream.position,
                requested=sampled.requested,
                scored=sampled.trained,
                advantages=advantages,
                stats=stats,
                audit=audit,
                times=clock.times,
                hidden_s=0.0,
            )
        )


def sample(team: Workers, stream: Stream, recipe: Recipe, clock: Clock, *, step: int, version: int) -> Sampled:
    """The scored groups that `step` trains on, all of them answered by the weights after `version` steps.

    DAPO's dynamic sampling: a group of equal rewards teaches nothing, so as many new questions as there are such groups
    are requested, in up to `sampling_rounds` rounds. Those still missing then are made up from the first groups of equal
    rewards. Over small data a question comes back within a step: under an id of its own, so that it is another sample.
    """
    requested: list[ScoredGroup] = []
    missing = recipe.prompts_per_step
    for sampling_round in range(recipe.sampling_rounds):
        prompts = stream.take(missing, beside=[one.group.prompt for one in requested])
        groups = clock.lap_at_end("generate", team.generate(prompts, step, sampling_round))
        scored = in_order(team.score(groups), prompts)
        clock.lap("score")
        assert all(one.group.version == version for one in scored), f"sampled with other weights than version {version}"
        requested += scored
        missing -= sum(map(teaches, scored))
        if not missing:
            break
    fillers = [place for place, one in enumerate(requested) if not teaches(one)][:missing]
    return Sampled(
        requested=requested, trained=[one for place, one in enumerate(requested) if teaches(one) or place in fillers]
    )


def compared(scored: Sequence[ScoredGroup], recipe: Recipe) -> list[NDArray[np.float64]]:
    """The advantages of each group's answers."""
    rewards, valid = np.stack([one.rewards for one in scored]), np.stack([one.valid for one in scored])
    return list(recipe.advantages(rewards, valid))


def teaches(scored: ScoredGroup) -> bool:
    """Whether the group's answers were rewarded differently."""
    return rewards_differ(scored.rewards, scored.valid)


def measured(sampled: Sampled, stats: UpdateStats) -> Measured:
    """What a schedule may steer by."""
    graded = [one.parts["accuracy"][one.valid] for one in sampled.requested if "accuracy" in one.parts]
    right = np.concatenate(graded) if graded else np.empty(0)
    return Measured(
        kl=stats.kl_mean if stats.tokens else float("nan"),
        accuracy=float(right.mean()) if len(right) else float("nan"),
    )


def in_order(scored: Sequence[ScoredGroup], prompts: Sequence[Prompt]) -> list[ScoredGroup]:
    """As the prompts were requested: a run must not depend on which engine was quicker."""
    by_id = {one.group.prompt.id: one for one in scored}
    return [by_id[prompt.id] for prompt in prompts]
