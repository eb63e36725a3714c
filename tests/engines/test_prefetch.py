"""The learner's prefetcher: how many micro-batches it prepares, for which packed samples, and when it stops."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from othink_ray.engines.prefetch import Precomputed, Prefetched, Prefetcher, PrefetchQueue
from othink_ray.types import Pack

TIMEOUT_S = 30


def sample(name: str, tokens: Sequence[int] = (1, 2)) -> Pack:
    values = np.zeros(len(tokens))
    return Pack(
        prompt_id=name,
        images=(b"pixels",),
        token_ids=np.array(tokens),
        segments=np.arange(len(tokens), dtype=np.int32),
        loss_weights=values,
        sampler_logprobs=values.astype(np.float32),
        advantages=values,
    )


def prepared(packs: Sequence[Pack], with_reference: bool = True) -> Prefetched:
    """A stand-in that records its arguments: the packs as the batch, `with_reference` as the image count."""
    batch: Any = packs
    return Prefetched(host_batch=batch, precomputed=Precomputed(encodes=int(with_reference)))


UPDATES = [[[sample("a")], [sample("b"), sample("c")]], [[sample("d")]]]


def names(queue: PrefetchQueue) -> list[list[str]]:
    return [[sample.prompt_id for sample in packs] for packs, _ in queue.started]


def test_each_time_one_more_micro_batch_is_prepared_in_order() -> None:
    prefetcher = Prefetcher(prepared)
    found = []
    for _ in range(5):
        found.append(names(prefetcher.take()))
        prefetcher.prefetch(UPDATES, with_reference=True)
    assert found == [[], [["a"]], [["a"], ["b", "c"]], [["a"], ["b", "c"], ["d"]], [["a"], ["b", "c"], ["d"]]]


@pytest.mark.parametrize("with_reference", [True, False])
def test_the_reference_runs_only_if_requested(with_reference: bool) -> None:
    prefetcher = Prefetcher(prepared)
    prefetcher.prefetch(UPDATES, with_reference=with_reference)
    found = prefetcher.take().pop(UPDATES[0][0])
    assert found is not None
    assert found.precomputed.encodes == with_reference


def test_an_update_stops_prefetch_and_waits_only_for_its_own() -> None:
    started, finish = threading.Event(), threading.Event()

    def slow(packs: Sequence[Pack], with_reference: bool) -> Prefetched:
        if packs[0].prompt_id == "b":
            started.set()
            assert finish.wait(TIMEOUT_S)
        return prepared(packs)

    prefetcher = Prefetcher(slow)
    prefetcher._limit = 2
    with ThreadPoolExecutor() as threads:
        preparing = threads.submit(prefetcher.prefetch, UPDATES, with_reference=True)
        assert started.wait(TIMEOUT_S)
        queue = prefetcher.take()
        assert queue.pop([sample("a")])
        assert queue.pop([sample("d")]) is None
        waiting = threads.submit(queue.pop, [sample("b"), sample("c")])
        assert not waiting.done()
        finish.set()
        found = waiting.result(TIMEOUT_S)
        preparing.result(TIMEOUT_S)
    assert found is not None
    assert found.host_batch is UPDATES[0][1]
    assert names(queue) == []
    assert names(prefetcher.take()) == []


def test_an_error_is_raised_again_where_its_samples_are_used() -> None:
    def fails(packs: Sequence[Pack], with_reference: bool) -> Prefetched:
        raise ValueError("no such image")

    prefetcher = Prefetcher(fails)
    with pytest.raises(ValueError, match="no such image"):
        prefetcher.prefetch(UPDATES, with_reference=True)
    queue = prefetcher.take()
    assert queue.pop([sample("d")]) is None
    with pytest.raises(ValueError, match="no such image"):
        queue.pop([sample("a")])


def test_only_a_batch_of_exactly_these_samples_is_used() -> None:
    prefetcher = Prefetcher(prepared)
    prefetcher._limit = 1
    a, b = sample("a"), sample("b")
    prefetcher.prefetch([[[a, b], []]], with_reference=True)
    queue = prefetcher.take()
    assert queue.pop([sample("a"), sample("b")])
    assert queue.pop([])
    changed = [replace(b, **{name: getattr(b, name) + 1}) for name in ("advantages", "loss_weights")]
    for other in (sample("c"), sample("b", (1, 3)), sample("b", (1, 2, 3)), replace(b, images=(b"others",)), *changed):
        assert queue.pop([a, other]) is None
    assert queue.pop([b, a]) is None
    assert queue.pop([a]) is None
