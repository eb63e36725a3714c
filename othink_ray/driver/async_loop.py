"""The loop with sampling and learning side by side: each step's answers are of the weights one step older.

generate, score and prepare step k+1 | update with step k          then push, and only then the journal looks
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from othink_ray.core.kl import BetaSchedule
from othink_ray.driver.loop import Callbacks, Recipe, Sampled, Step, Stream, Workers, compared, measured, sample
from othink_ray.tracing import Clock
from othink_ray.types import Pack

SIDES = 2  # threads that `train_overlapped` needs
_WAKE_S = 1.0  # a Ctrl-C that comes just before a thread falls asleep is heard only when it wakes

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    """What one step learns from."""

    sampled: Sampled
    advantages: list[NDArray[np.float64]]
    packs: list[Pack]


def _rows(team: Workers, stream: Stream, recipe: Recipe, clock: Clock, *, step: int, version: int) -> _Rows:
    sampled = sample(team, stream, recipe, clock, step=step, version=version)
    advantages = compared(sampled.trained, recipe)
    return _Rows(sampled=sampled, advantages=advantages, packs=recipe.pack(sampled.trained, advantages))


def train_overlapped(
    sides: Executor,
    team: Workers,
    stream: Stream,
    *,
    steps: range,
    recipe: Recipe,
    schedule: BetaSchedule,
    schedule_state: Mapping[str, float],
    lr: Callable[[int], float],
    journal: Callbacks,
    prepare_ahead: bool,
) -> None:
    """As `loop.train`. The first step alone has answers of its own weights: nothing was learned before it.

    When it raises, the other side may still be at work: whoever ends the team's processes ends that too.
    """

    def rows_ahead(clock: Clock, step: int, wants_reference: bool) -> _Rows:
        rows = _rows(team, stream, recipe, clock, step=step, version=step - 1)
        if prepare_ahead:
            team.prepare(rows.packs, updates=recipe.updates_per_step, with_reference=wants_reference)
        return rows

    team.push(steps.start)
    journal.begin(steps.start)
    for step in steps:
        clock = Clock()
        if step == steps.start:
            following = sides.submit(_rows, team, stream, recipe, clock, step=step, version=step)
        rows = _result(following)
        data_position = stream.position
        beta = schedule.beta(step, schedule_state)
        ahead = Clock()
        if step + 1 in steps:
            likely = schedule.beta(step + 1, schedule_state)  # a schedule that steers knows better after this step
            following = sides.submit(rows_ahead, ahead, step + 1, likely > 0)
        stale = any(one.group.version < step for one in rows.sampled.trained)
        learning = sides.submit(
            team.update, rows.packs, updates=recipe.updates_per_step, beta=beta, lr=lr(step), stale=stale
        )
        stats = _result(learning, following)
        clock.lap("update")
        _result(following)
        clock.lap("generate")
        audit = team.push(step + 1)
        clock.lap("push")
        schedule_state = schedule.after(schedule_state, measured(rows.sampled, stats))
        journal.step(
            Step(
                step=step,
                beta=beta,
                schedule_state=schedule_state,
                data_position=data_position,
                requested=rows.sampled.requested,
                scored=rows.sampled.trained,
                advantages=rows.advantages,
                stats=stats,
                audit=audit,
                times={"score": 0.0} | clock.times,  # waiting for the other side's scores is in `generate`
                hidden_s=min(sum(ahead.times.values()), clock.times["update"]),
            )
        )


def _result(wanted: Future[T], *meanwhile: Future[Any]) -> T:
    """That of `wanted`; what goes wrong with the others before is raised at once."""
    pending: set[Future[Any]] = {wanted, *meanwhile}
    while not wanted.done():
        done, pending = wait(pending, timeout=_WAKE_S, return_when=FIRST_COMPLETED)
        for one in done:
            one.result()
    return wanted.result()
