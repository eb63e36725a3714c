"""The training loop with sampling and learning overlapped: each step trains on answers of weights one step older.

Step k: two threads run beside each other, and the push waits for both, because engines load weights only between
answers:

    sampling thread (engines, reward actors)                      learning thread (learner)
    generate and score step k+1, with weights version k           optimizer steps of step k
    prefetch: prepare the prompts of step k+2 on the engines      gather weights (queued right behind)
    prefetch_update: prepare step k+1 on the learner (beside its optimizer steps)
    ------------------------------------------- both finished -------------------------------------------
    push version k+1, then callbacks
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from othink_ray.core.kl import BetaSchedule
from othink_ray.driver.loop import (
    Callbacks,
    Recipe,
    Sampled,
    StepRecord,
    Stream,
    Workers,
    compute_advantages,
    measure,
    sample,
)
from othink_ray.tracing import Clock
from othink_ray.types import Pack

OVERLAP_THREADS = 2  # threads that `train_overlapped` needs: one samples, one learns
_WAKE_S = 1.0  # a Ctrl-C that arrives just before a thread starts to wait is handled only when it wakes

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Batch:
    """The training data of one step."""

    sampled: Sampled
    advantages: list[NDArray[np.float64]]
    packs: list[Pack]


def _sample_batch(workers: Workers, stream: Stream, recipe: Recipe, clock: Clock, *, step: int, version: int) -> _Batch:
    sampled = sample(workers, stream, recipe, clock, step=step, version=version)
    workers.prefetch(stream.upcoming())
    advantages = compute_advantages(sampled.trained, recipe)
    return _Batch(sampled=sampled, advantages=advantages, packs=recipe.pack(sampled.trained, advantages))


def train_overlapped(
    executor: Executor,
    workers: Workers,
    stream: Stream,
    *,
    steps: range,
    recipe: Recipe,
    schedule: BetaSchedule,
    schedule_state: Mapping[str, float],
    lr: Callable[[int], float],
    callbacks: Callbacks,
    prefetch_update: bool,
) -> None:
    """Run `steps` like `loop.train`, but sample each step during the update before it, with staleness 1.

    The first step has no update before it, and staleness 0. When this function raises, a thread may still run; that
    thread ends when the caller ends the workers' processes.
    """

    def sample_next(clock: Clock, step: int, expected_beta: float) -> _Batch:
        batch = _sample_batch(workers, stream, recipe, clock, step=step, version=step - 1)
        if prefetch_update:
            workers.prefetch_update(recipe.request(batch.packs, beta=expected_beta, lr=lr(step), stale=True))
        return batch

    workers.push(steps.start)
    callbacks.on_start(steps.start)
    for step in steps:
        clock = Clock()
        if step == steps.start:
            next_batch = executor.submit(_sample_batch, workers, stream, recipe, clock, step=step, version=step)
        batch = _result(next_batch)
        data_position = stream.position
        beta = schedule.beta(step, schedule_state)
        sampling_clock = Clock()
        if step + 1 in steps:
            # An adaptive schedule may change beta after this step; the prefetch depends only on whether beta is 0.
            expected_beta = schedule.beta(step + 1, schedule_state)
            next_batch = executor.submit(sample_next, sampling_clock, step + 1, expected_beta)
        stale = any(scored.group.version < step for scored in batch.sampled.trained)
        update = workers.begin_update(recipe.request(batch.packs, beta=beta, lr=lr(step), stale=stale))
        workers.begin_push()
        stats = _result(executor.submit(workers.finish_update, update), next_batch)
        clock.lap("update")
        _result(next_batch)
        clock.lap("generate")
        audit = workers.push(step + 1)
        clock.lap("push")
        schedule_state = schedule.after(schedule_state, measure(batch.sampled, stats))
        callbacks.on_step(
            StepRecord(
                step=step,
                beta=beta,
                schedule_state=schedule_state,
                data_position=data_position,
                requested=batch.sampled.requested,
                scored=batch.sampled.trained,
                advantages=batch.advantages,
                stats=stats,
                audit=audit,
                times={"score": 0.0} | clock.times,  # waiting for the sampling thread's scores counts as `generate`
                hidden_s=min(sum(sampling_clock.times.values()), clock.times["update"]),
            )
        )


def _result(future: Future[T], *others: Future[Any]) -> T:
    """Return the result of `future`; an error of `others` that comes first is raised at once."""
    pending: set[Future[Any]] = {future, *others}
    while not future.done():
        done, pending = wait(pending, timeout=_WAKE_S, return_when=FIRST_COMPLETED)
        for finished in done:
            finished.result()
    return future.result()
