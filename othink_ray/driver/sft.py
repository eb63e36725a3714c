"""Supervised fine-tuning: maximum likelihood of worked answers, on the same learner as GRPO-D.

One step: take prompts -> worked answers -> packed samples -> update, one after the other. Nothing is sampled or scored,
and weights are pushed only by the callbacks, before an evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from othink_ray.core.packing import pack_demonstrations
from othink_ray.driver.loop import Stream
from othink_ray.tracing import Clock
from othink_ray.types import Group, Prompt, UpdateRequest, UpdateSettings, UpdateStats


class DemonstrationSource(Protocol):
    """Returns one group with a worked answer for each prompt."""

    def answer(self, prompts: Sequence[Prompt]) -> list[Group]: ...


class SFTLearner(Protocol):
    """The learner's update, as SFT calls it."""

    def update(self, request: UpdateRequest) -> UpdateStats: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class SFTStepRecord:
    """Record of one finished step, for the callbacks."""

    step: int
    data_position: int  # of the next step's first prompt
    demonstrations: Sequence[Group]
    stats: UpdateStats
    times: Mapping[str, float]  # seconds of each phase: generate, update


class SFTHooks(Protocol):
    """Hooks of the loop, for logging, evaluation and checkpoints."""

    def on_start(self, step: int) -> None: ...

    def on_step(self, record: SFTStepRecord) -> None: ...


def fine_tune(
    learner: SFTLearner,
    demonstrations: DemonstrationSource,
    stream: Stream,
    *,
    steps: range,
    batch_size: int,
    lr: Callable[[int], float],
    callbacks: SFTHooks,
) -> None:
    """Run `steps`; all answers of a batch weigh the same, and so do all tokens of an answer."""
    callbacks.on_start(steps.start)
    for step in steps:
        clock = Clock()
        groups = demonstrations.answer(stream.take(batch_size, beside=()))
        clock.lap("generate")
        settings = UpdateSettings(beta=0.0, lr=lr(step), loss="sft", tis="none")
        stats = learner.update(UpdateRequest(packs=pack_demonstrations(groups), updates=1, settings=settings))
        clock.lap("update")
        callbacks.on_step(
            SFTStepRecord(
                step=step,
                data_position=stream.position,
                demonstrations=groups,
                stats=stats,
                times=clock.times,
            )
        )
