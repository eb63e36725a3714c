"""GRPO-D as the paper writes it; everything distributed, slow or fallible is a method of `Workers`.

One training step, from top to bottom. The four columns run beside each other; an entry waits only for the entries above
it in its column and for the arrows into it. So an answer is scored while others are sampled, and the engines prepare
the next prompts while the learner updates:

    driver                    rollout engines                reward actors      learner
    take prompts        -->   generate (streams groups) -->  score
    record_lengths      <--------------------------------------+                             (DAPO: until enough groups)
    sleep               -->   free a GPU shared with the learner
    prefetch            -->   prepare the next prompts
    advantages, packs
    begin_update        ------------------------------------------------------> optimizer steps, statistics
    begin_push          ------------------------------------------------------> gather the weights right behind them
    finish_update       <------------------------------------------------------ (statistics; the gather goes on)
    push                -->   load weights, probe       <---------------------- weights, digests, logprobs
                              audit: each engine holds the same bits and gives the same logprobs as the learner
    callbacks                 (idle, or answer held-out questions)              (idle, or write a checkpoint)

async_loop.py is the sibling that samples the next step during the update; sft.py trains on demonstrations.
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
from othink_ray.types import Audit, Pack, Prompt, ScoredGroup, UpdateRequest, UpdateSettings, UpdateStats


class Stream(Protocol):
    """An endless source of training prompts with a position that can be saved."""

    @property
    def position(self) -> int:
        """Position of the next prompt in the data."""
        ...

    def take(self, count: int, beside: Sequence[Prompt]) -> list[Prompt]:
        """Return the next `count` prompts; their ids are unique among themselves and differ from those in `beside`."""
        ...

    def upcoming(self) -> Sequence[Prompt]:
        """Return the prompts that `take` will return next, as far as they are read already."""
        ...


class Workers(Protocol):
    """The operations of a step, over pools of processes; `begin_*` and `prefetch*` start work and return at once."""

    def generate(self, prompts: Sequence[Prompt], step: int, sampling_round: int) -> Iterator[Any]:
        """Yield groups, or references to them, as they finish; each round of a step has its own random seeds."""
        ...

    def score(self, groups: Iterable[Any]) -> list[ScoredGroup]:
        """Score groups as they arrive; return after the last one."""
        ...

    def record_lengths(self, scored_groups: Sequence[ScoredGroup]) -> None:
        """Record the answers' lengths, by which the next prompts are balanced over the engines."""
        ...

    def sleep(self) -> None:
        """With rollout.sleep, free the memory of engines that share GPUs with the learner until the next push."""
        ...

    def begin_update(self, request: UpdateRequest) -> Any:
        """Start the learner's optimizer steps; return a handle for `finish_update`."""
        ...

    def begin_push(self) -> None:
        """Queue the gather of the new weights right behind the update."""
        ...

    def prefetch(self, prompts: Sequence[Prompt]) -> None:
        """Start to prepare prompts on the engines that will sample them."""
        ...

    def finish_update(self, update: Any) -> UpdateStats:
        """Wait for the update and return its statistics."""
        ...

    def push(self, version: int) -> Audit:
        """Push the weights; return when every engine has `version` and its logprobs match the learner's."""
        ...

    def prefetch_update(self, request: UpdateRequest) -> None:
        """Start to prepare the update after the running one: inputs that do not depend on the weights."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """The parts of a step in which GRPO and its variants differ."""

    prompts_per_step: int
    updates_per_step: int
    sampling_rounds: int
    advantages: Advantages
    pack: Callable[[Sequence[ScoredGroup], Sequence[NDArray[np.float64]]], list[Pack]]
    loss: str  # a key of core.losses.LOSSES
    tis: str  # for answers of the current weights (engines and learner round differently), a key of TIS_MODES
    stale_tis: str  # for answers of older weights

    def request(self, packs: Sequence[Pack], *, beta: float, lr: float, stale: bool) -> UpdateRequest:
        """Return the update on `packs`; `stale`: their answers were sampled with older weights than those trained."""
        tis = self.stale_tis if stale else self.tis
        settings = UpdateSettings(beta=beta, lr=lr, loss=self.loss, tis=tis)
        return UpdateRequest(packs=packs, updates=self.updates_per_step, settings=settings)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """The scored groups of one step in the order of their prompts: all requested ones, and the trained subset."""

    requested: Sequence[ScoredGroup]
    trained: Sequence[ScoredGroup]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """Record of one finished step, for the callbacks."""

    step: int
    beta: float
    schedule_state: Mapping[str, float]  # for the next step
    data_position: int  # of the next step's first prompt
    requested: Sequence[ScoredGroup]
    scored: Sequence[ScoredGroup]  # the trained subset of `requested`
    advantages: Sequence[NDArray[np.float64]]  # one array of shape (G,) for each group of `scored`
    stats: UpdateStats
    audit: Audit
    times: dict[str, float]  # seconds of each phase: generate, score, update, push
    hidden_s: float  # seconds of sampling for the next step that overlapped with this step's update


class Callbacks(Protocol):
    """Hooks of the loop, for logging, evaluation and checkpoints."""

    def on_start(self, step: int) -> None:
        """Run once before the first step; all engines have the weights after `step` steps."""
        ...

    def on_step(self, record: StepRecord) -> None:
        """Run after each step; all engines have the weights after it."""
        ...


def train(
    workers: Workers,
    stream: Stream,
    *,
    steps: range,
    recipe: Recipe,
    schedule: BetaSchedule,
    schedule_state: Mapping[str, float],
    lr: Callable[[int], float],
    callbacks: Callbacks,
) -> None:
    """Run `steps`; after each one the callbacks log, evaluate and save a checkpoint."""
    workers.push(steps.start)
    callbacks.on_start(steps.start)
    for step in steps:
        clock = Clock()
        beta = schedule.beta(step, schedule_state)
        sampled = sample(workers, stream, recipe, clock, step=step, version=step)
        workers.sleep()
        workers.prefetch(stream.upcoming())
        advantages = compute_advantages(sampled.trained, recipe)
        packs = recipe.pack(sampled.trained, advantages)
        update = workers.begin_update(recipe.request(packs, beta=beta, lr=lr(step), stale=False))
        workers.begin_push()
        stats = workers.finish_update(update)
        clock.lap("update")
        audit = workers.push(step + 1)
        clock.lap("push")
        schedule_state = schedule.after(schedule_state, measure(sampled, stats))
        callbacks.on_step(
            StepRecord(
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


def sample(workers: Workers, stream: Stream, recipe: Recipe, clock: Clock, *, step: int, version: int) -> Sampled:
    """Return the scored groups of `step`, all of them sampled with the weights after `version` steps.

    DAPO's dynamic sampling: a group of equal rewards has no gradient, so a new prompt is sampled for it, in up to
    `sampling_rounds` rounds. If groups are still missing after the last round, the first groups of equal rewards fill
    the batch. On small data a prompt may be requested again within a step, under a new id, so that it is sampled anew.
    """
    requested: list[ScoredGroup] = []
    missing = recipe.prompts_per_step
    for sampling_round in range(recipe.sampling_rounds):
        prompts = stream.take(missing, beside=[scored.group.prompt for scored in requested])
        groups = clock.lap_at_end("generate", workers.generate(prompts, step, sampling_round))
        scored_groups = in_prompt_order(workers.score(groups), prompts)
        workers.record_lengths(scored_groups)
        clock.lap("score")
        assert all(scored.group.version == version for scored in scored_groups), (
            f"sampled with other weights than version {version}"
        )
        requested += scored_groups
        missing -= sum(map(has_signal, scored_groups))
        if not missing:
            break
    fillers = [index for index, scored in enumerate(requested) if not has_signal(scored)][:missing]
    trained = [scored for index, scored in enumerate(requested) if has_signal(scored) or index in fillers]
    return Sampled(requested=requested, trained=trained)


def compute_advantages(scored_groups: Sequence[ScoredGroup], recipe: Recipe) -> list[NDArray[np.float64]]:
    """Return the advantages of each group's answers, N arrays of shape (G,)."""
    rewards = np.stack([scored.rewards for scored in scored_groups])
    valid = np.stack([scored.valid for scored in scored_groups])
    return list(recipe.advantages(rewards, valid))


def has_signal(scored: ScoredGroup) -> bool:
    """Return whether the rewards of the group's valid answers differ."""
    return rewards_differ(scored.rewards, scored.valid)


def measure(sampled: Sampled, stats: UpdateStats) -> Measured:
    """Return the measurements of a step that adaptive schedules use; NaN where there is none."""
    graded = [scored.parts["accuracy"][scored.valid] for scored in sampled.requested if "accuracy" in scored.parts]
    correct = np.concatenate(graded) if graded else np.empty(0)
    return Measured(
        kl=stats.kl_mean if stats.tokens else float("nan"),
        accuracy=float(correct.mean()) if len(correct) else float("nan"),
    )


def in_prompt_order(scored_groups: Sequence[ScoredGroup], prompts: Sequence[Prompt]) -> list[ScoredGroup]:
    """Return the groups in the order of their prompts: a run must not depend on which engine finished first."""
    by_id = {scored.group.prompt.id: scored for scored in scored_groups}
    return [by_id[prompt.id] for prompt in prompts]
