"""Prefetch of the learner: it runs on its own thread beside an update."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from othink_ray.config.schema import Config
from othink_ray.runtime.bundles import learner_bundles
from othink_ray.runtime.learner_pool import LearnerLost, LearnerPool
from othink_ray.runtime.placement import Placement
from othink_ray.types import Pack, UpdateRequest, UpdateSettings

TIMEOUT_S = 60


@dataclass(frozen=True)
class Updated:
    """Fields of UpdateStats that the pool reads, and what the tests check."""

    prepared: bool
    thread: str
    bad_prompts: tuple[str, ...] = ("a",)


class WaitingEngine:
    """An engine whose update ends only after the next update's packs were prepared."""

    def __init__(self, rendezvous: Any) -> None:
        self.prepared = threading.Event()

    def update(self, updates: Any, settings: UpdateSettings) -> Updated:
        prepared = self.prepared.wait(TIMEOUT_S) if settings.loss == "waits" else True
        self.prepared.clear()
        return Updated(prepared, threading.current_thread().name)

    def prefetch(self, updates: Sequence[Sequence[Sequence[Pack]]], settings: UpdateSettings) -> None:
        [[[pack]]] = updates
        if pack.prompt_id == "deadly":
            os._exit(1)
        assert settings.loss == "next"
        self.prepared.set()


def pack_of(name: str) -> Pack:
    zeros = np.zeros(2)
    return Pack(
        prompt_id=name,
        images=(),
        token_ids=np.arange(2),
        segments=np.arange(2, dtype=np.int32),
        loss_weights=zeros,
        sampler_logprobs=zeros.astype(np.float32),
        advantages=zeros,
    )


def request(name: str, loss: str) -> UpdateRequest:
    settings = UpdateSettings(beta=0.1, lr=0.1, loss=loss, tis="none")
    return UpdateRequest(packs=[pack_of(name)], updates=1, settings=settings)


@pytest.fixture
def pool(ray_here: None, workers_config: Config) -> Iterator[LearnerPool]:
    learner = replace(workers_config.learner, cpus_per_rank=0.1)
    with Placement(learner_bundles(learner), workers_config.cluster, print) as placement:
        pool = LearnerPool(WaitingEngine, learner, placement)  # type: ignore[arg-type]
        pool.wait(pool.start())
        yield pool


def test_the_next_packs_arrive_while_an_update_runs(pool: LearnerPool) -> None:
    begun = pool.begin_update(request("a", "waits"))
    pool.prefetch(request("b", "next"))
    found: Any = pool.finish_update(begun)
    assert found.prepared and found.bad_prompts == ("a",)
    after: Any = pool.update(request("b", "ends"))
    assert after.thread == found.thread  # one thread runs all updates


def test_a_rank_that_dies_in_prefetch_is_lost(pool: LearnerPool) -> None:
    begun = pool.begin_update(request("a", "waits"))
    pool.prefetch(request("deadly", "next"))
    with pytest.raises(LearnerLost):
        pool.finish_update(begun)
