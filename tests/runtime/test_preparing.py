"""The learner prepares on a thread of its own while it updates."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from othink_ray.config.schema import Config
from othink_ray.runtime.learner_pool import LearnerLost, LearnerPool
from othink_ray.runtime.placement import Placement, learner_bundles
from othink_ray.types import Pack

PATIENCE_S = 60


@dataclass(frozen=True)
class Updated:
    """All that the pool asks of an update's result, and what is asked here."""

    told: bool
    thread: str
    bad_prompts: tuple[str, ...] = ("a",)


class Patient:
    """An engine whose update ends only when it was told of the next one's rows."""

    def __init__(self, place: Any) -> None:
        self.told = threading.Event()

    def update(self, updates: Any, *, beta: float, lr: float, loss: str, correction: str) -> Updated:
        told = self.told.wait(PATIENCE_S) if loss == "waits" else True
        self.told.clear()
        return Updated(told, threading.current_thread().name)

    def prepare(self, updates: Sequence[Sequence[Sequence[Pack]]], *, with_reference: bool) -> None:
        [[[row]]] = updates
        if row.prompt_id == "deadly":
            os._exit(1)
        assert with_reference
        self.told.set()


def row(name: str) -> Pack:
    nothing = np.zeros(2)
    return Pack(
        prompt_id=name,
        images=(),
        token_ids=np.arange(2),
        segments=np.arange(2, dtype=np.int32),
        loss_weights=nothing,
        sampler_logprobs=nothing.astype(np.float32),
        advantages=nothing,
    )


HOW: dict[str, Any] = {"updates": 1, "beta": 0.1, "lr": 0.1, "correction": "none"}


@pytest.fixture
def pool(ray_here: None, team_config: Config) -> Iterator[LearnerPool]:
    learner = replace(team_config.learner, cpus_per_rank=0.1)
    with Placement(learner_bundles(learner), team_config.cluster, print) as placement:
        pool = LearnerPool(Patient, learner, placement)  # type: ignore[arg-type]
        pool.wait(pool.start())
        yield pool


def test_the_next_rows_arrive_while_an_update_runs(pool: LearnerPool) -> None:
    begun = pool.begin_update([row("a")], loss="waits", **HOW)
    pool.prepare([row("b")], updates=1, with_reference=True)
    found: Any = pool.updated(begun)
    assert found.told and found.bad_prompts == ("a",)
    after: Any = pool.update([row("b")], loss="ends", **HOW)
    assert after.thread == found.thread  # all updates are one thread's


def test_a_rank_that_dies_of_preparing_is_lost(pool: LearnerPool) -> None:
    begun = pool.begin_update([row("a")], loss="waits", **HOW)
    pool.prepare([row("deadly")], updates=1, with_reference=True)
    with pytest.raises(LearnerLost):
        pool.updated(begun)
