"""Calls that pools and pushes make on their actors, recorded by fake actors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock, create_autospec

import pytest
import torch

from othink_ray.config.schema import Config
from othink_ray.engines.vllm_transfer import open_sender
from othink_ray.runtime import actors, weight_sync
from othink_ray.runtime.actors import LearnerActor, _interface_with
from othink_ray.runtime.futures import ProcessLost
from othink_ray.runtime.learner_pool import LearnerPool
from othink_ray.runtime.weight_sync import AuditCalls, AuditedPush, Sent, TransferPush
from othink_ray.weights import Tolerance
from tests.driver.fakes import stats_of

Calls = list[tuple[Any, ...]]


class Actor:
    """Records every remote call by name and arguments; returns the value of that name in `results`, else None."""

    def __init__(self, calls: Calls, **results: Any) -> None:
        self.calls, self.results = calls, results

    def __getattr__(self, name: str) -> Any:
        def remote(*arguments: Any) -> Any:
            self.calls.append((name, *arguments))
            return self.results.get(name)

        return SimpleNamespace(remote=remote)


def pool_of(*ranks: Actor, config: Config) -> LearnerPool:
    actors = iter(ranks)
    placement: Any = SimpleNamespace(start=lambda *_: next(actors))
    engine: Any = None
    learner: Any = SimpleNamespace(world_size=len(ranks), step_timeout_s=1)
    pool = LearnerPool(engine, learner, placement)
    waiting: Any = pool
    waiting.wait_for = lambda calls, *_: list(calls)
    return pool


def test_a_checkpoint_has_the_digests_of_all_ranks(config: Config) -> None:
    ranks = [Actor([], finish_save={f"learner_{rank}.safetensors": str(rank)}) for rank in range(2)]
    assert pool_of(*ranks, config=config).finish_save() == {"learner_0.safetensors": "0", "learner_1.safetensors": "1"}
    with pytest.raises(OSError, match="disk is full"):
        pool_of(ranks[0], Actor([], finish_save="disk is full"), config=config).finish_save()


def test_bad_prompts_are_joined_over_all_ranks(config: Config) -> None:
    pool, stats = pool_of(Actor([]), Actor([]), config=config), stats_of()
    found = pool.finish_update([replace(stats, bad_prompts=("a",)), stats, replace(stats, bad_prompts=("b", "c"))])
    assert found.bad_prompts == ("a", "b", "c")


def test_every_rank_sends(config: Config) -> None:
    calls: Calls = []
    pool_of(Actor(calls), Actor(calls), config=config).send()
    assert calls == [("send",)] * 2


def test_every_rank_takes_part_in_an_export(config: Config) -> None:
    calls: Calls = []
    pool = pool_of(Actor(calls), Actor(calls), config=config)
    waited: list[Any] = []
    changed: Any = pool
    changed.wait_for = lambda calls, doing: waited.append((len(calls), doing))
    pool.export(Path("there"))
    assert calls == [("export", Path("there").absolute())] * 2
    assert waited == [(2, "export")]


def test_a_gpu_transfer_is_sent_before_engines_finish_the_push() -> None:
    calls: Calls = []
    learner: Any = SimpleNamespace(open_senders=lambda _: calls.append(("open",)), send=lambda: calls.append(("send",)))
    rollout: Any = SimpleNamespace(
        actors=[],
        processes_per_actor=1,
        finish_push=lambda *args, **kwargs: calls.append((*args, kwargs)) or ["version"],
    )
    sent = TransferPush("nccl", learner, rollout, 64).send(3)
    assert calls == [("open",), ("send",), (3, {"buckets": 0})]
    assert (sent.loading, sent.versions) == ([], ["version"])


def test_a_sender_is_opened_for_all_processes_of_all_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    learner: Any = SimpleNamespace(open_senders=made.append)
    rollout: Any = SimpleNamespace(actors=["one", "other"], processes_per_actor=2)
    TransferPush("nccl", learner, rollout, 64)
    opened: dict[str, Any] = {}

    def opener(backend: str, weights: Any, engines: Any, rendezvous: Any, **more: Any) -> str:
        opened.update(more, backend=backend, weights=weights, engines=engines.actors, rendezvous=rendezvous)
        return "sender"

    monkeypatch.setattr(weight_sync, "open_sender", create_autospec(open_sender, side_effect=opener))
    assert made[0]("rendezvous", 1234, "weights") == "sender"
    names = ("backend", "weights", "rendezvous", "port")
    assert [opened.pop(name) for name in names] == ["nccl", "weights", "rendezvous", 1234]
    assert opened == {"engines": ["one", "other"], "receivers": 4, "bucket_bytes": 64 * 2**20}


def test_learner_memory_is_released_before_the_push_ends() -> None:
    """An engine on the same GPU finishes the push after that, and its KV cache wakes."""
    events: list[str] = []

    def named_weights() -> Iterator[tuple[str, torch.Tensor]]:
        yield "weight", torch.zeros(2)
        events.append("gathered")

    engine: Any = SimpleNamespace(named_weights=named_weights, release_memory=lambda: events.append("released"))
    actor = LearnerActor()
    actor.engine = engine
    actor.open_sender(lambda _: SimpleNamespace(send_weights=lambda: events.append("sent")))
    actor.send()
    actor.follow()
    for bucket in actor.buckets(64):
        events.append("bucket" if bucket else "end")
    assert events == ["sent", "released", "gathered", "released", "gathered", "bucket", "released", "end"]


def test_a_new_engine_before_the_first_push_keeps_folder_weights(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_sync, "ray", SimpleNamespace(put=lambda given: given))
    unused: Any = None
    rollout: Any = SimpleNamespace()
    audited = AuditedPush(unused, unused, rollout, config.weights, [], 1.0, Tolerance("float32", layers=1))
    audited.sync_new_engines([0])


def test_a_new_engine_after_the_first_push_receives_it(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_sync, "ray", SimpleNamespace(put=lambda given: given))
    unused: Any = None
    rollout: Any = SimpleNamespace()
    transport: Any = SimpleNamespace(send_again=Mock(side_effect=ProcessLost("sent")))
    audited = AuditedPush(unused, unused, rollout, config.weights, [], 1.0, Tolerance("float32", layers=1))
    audited.transport, audited.version = transport, 0
    with pytest.raises(ProcessLost, match="sent"):
        audited.sync_new_engines([1])
    transport.send_again.assert_called_once_with(0, [1])


def test_a_learner_lost_while_digesting_is_named_as_such(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engines' checks take its digests as arguments, and fail with it."""
    monkeypatch.setattr(weight_sync, "ray", SimpleNamespace(put=lambda given: given))
    unused: Any = None
    learner: Any = SimpleNamespace(wait_for=Mock(side_effect=ProcessLost("the learner died")))
    rollout: Any = SimpleNamespace(
        wait_for=lambda calls, doing: [0] if doing == "loading weights" else pytest.fail(f"waited first for: {doing}")
    )
    audited = AuditedPush(unused, learner, rollout, config.weights, [], 1.0, Tolerance("float32", layers=1))
    audited.version = 0
    with pytest.raises(ProcessLost, match="the learner died"):
        audited._collect(AuditCalls(sent=Sent(loading=[], versions=[]), checks=[], probes=[]))


def test_a_rank_finds_a_free_port_and_its_network_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 1024 <= LearnerActor().free_port() < 2**16
    addresses = {"lo": ["127.0.0.1", "::1"], "eth0": ["10.0.0.5", "fe80::1"], "eth1": ["10.1.0.5", "fe80::2"]}
    interfaces = {name: [SimpleNamespace(address=each) for each in listed] for name, listed in addresses.items()}
    monkeypatch.setattr(actors, "psutil", SimpleNamespace(net_if_addrs=lambda: interfaces))
    assert [_interface_with(address) for address in ("10.1.0.5", "10.0.0.5", "10.2.0.5")] == ["eth1", "eth0", "lo"]
