"""`Receiver`, the receiving end of a push in every engine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, set_num_threads  # by name: vLLM replaces torch.set_num_threads by a no-op

from othink_ray.engines.base import Receiver, UnfinishedPush
from othink_ray.weights import TensorDigest, WorkerDigests


class Engine(Receiver):
    """A receiver that records torch's thread count at each call."""

    def __init__(self) -> None:
        self.threads: list[int] = []

    def _write(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        self.threads.append(torch.get_num_threads())
        for _ in weights:
            pass

    def _drop_caches(self) -> None: ...

    def _held_weights(self, expected: Mapping[str, TensorDigest], complete: bool) -> Sequence[WorkerDigests]:
        self.threads.append(torch.get_num_threads())
        return [WorkerDigests(shards={}, faults={"w": "is stale"})]


def breaking() -> Iterator[Any]:
    raise OSError("a bucket was lost")
    yield


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    set_num_threads(3)
    yield
    set_num_threads(before)


def test_weights_load_on_one_thread_and_threads_are_restored(
    three_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)  # as vLLM does
    engine = Engine()
    engine.begin_push()
    engine.load_weights([])
    assert torch.get_num_threads() == 3
    with pytest.raises(OSError, match="a bucket was lost"):
        engine.load_weights(breaking())
    assert engine.check_weights({}, complete=False) == {"w": "is stale"}
    assert (torch.get_num_threads(), engine.threads) == (3, [1, 1, 1])


def test_a_push_with_a_missing_bucket_is_refused() -> None:
    engine = Engine()
    engine.begin_push()
    engine.load_weights([])
    with pytest.raises(UnfinishedPush, match="only 1 of the 2 buckets of weights version 7 arrived"):
        engine.finish_push(7, buckets=2)
