"""The ranks of an NCCL push over real sockets: one sender, and a separate rank for every process of every engine."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from othink_ray.engines.base import RendezvousInfo
from othink_ray.engines.vllm_transfer import open_sender
from othink_ray.runtime import weight_sync
from tests.gpu import fake_device

WEIGHTS = [(str(number), torch.full((100,), float(number))) for number in range(7)]


class Engine:
    """vLLM's receivers of one engine, one per process, called like a Ray actor."""

    def __init__(self, processes: int, threads: ThreadPoolExecutor) -> None:
        from vllm.config import WeightTransferConfig
        from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

        self.threads, self.loaded = threads, [list[tuple[str, Tensor]]() for _ in range(processes)]
        self.receivers = [
            WeightTransferEngineFactory.create_engine(
                WeightTransferConfig(backend="nccl"),
                SimpleNamespace(
                    parallel_config=SimpleNamespace(data_parallel_index=0, world_size=processes, rank=rank),
                    model_config=None,
                ),
                torch.device("cpu"),
                SimpleNamespace(
                    load_weights=lambda weights, loaded=loaded: loaded.extend((n, w.clone()) for n, w in weights)
                ),
            )
            for rank, loaded in enumerate(self.loaded)
        ]
        self.transfer = SimpleNamespace(remote=self.call)

    def call(self, verb: str, *arguments: Any) -> list[Future[None]]:
        return [self.threads.submit(self._run, receiver, verb, *arguments) for receiver in self.receivers]

    @staticmethod
    def _run(receiver: Any, verb: str, *arguments: Any) -> None:
        if verb == "init_weight_transfer_engine":
            receiver.init_transfer_engine(receiver.parse_init_info(*arguments))
        elif verb == "update_weights":
            receiver.update_weights(*arguments)

    @property
    def ranks(self) -> list[int]:
        return [receiver.model_update_group.group.rank for receiver in self.receivers]


def wait(calls: Sequence[list[Future[None]]]) -> None:
    for call in calls:
        for future in call:
            future.result(timeout=60)


@pytest.mark.parametrize(("engines", "processes"), [(1, 1), (3, 1), (2, 2)])
def test_every_engine_process_gets_a_rank_and_all_weights(
    engines: int, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_sync, "ray", SimpleNamespace(get=wait))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    receivers = engines * processes
    with fake_device.device(), ThreadPoolExecutor(receivers) as threads:
        opened = [Engine(processes, threads) for _ in range(engines)]
        sender = open_sender(
            "nccl",
            lambda: iter(WEIGHTS),
            weight_sync.TransferClient(opened, processes),
            RendezvousInfo(rank=0, world_size=1, master_address="127.0.0.1", master_port=1),
            port=port,
            receivers=receivers,
            bucket_bytes=1000,
        )
        assert [rank for engine in opened for rank in engine.ranks] == list(range(1, 1 + receivers))
        sender.send_weights()
    for engine in opened:
        for loaded in engine.loaded:
            assert [name for name, _ in loaded] == [name for name, _ in WEIGHTS]
            assert all(torch.equal(weight, sent) for (_, weight), (_, sent) in zip(loaded, WEIGHTS, strict=True))
