"""The rendezvous of a learner's ranks, and each process's share of the cores."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pytest
import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # documented

from othink_ray.engines import base
from othink_ray.engines.base import RendezvousInfo, rendezvous_store, share_of_cores


def test_the_store_listens_only_on_its_address() -> None:
    for address in ("127.0.0.1", "127.0.0.2"):
        store = rendezvous_store(address)
        connections = psutil.Process().net_connections()
        listening = {connection.laddr for connection in connections if connection.status == psutil.CONN_LISTEN}
        assert [found.ip for found in listening if found.port == store.port] == [address]


def test_the_port_is_reserved_before_the_ranks_connect() -> None:
    store = rendezvous_store()
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("", store.port))


@pytest.mark.parametrize(
    ("cores", "threads", "sharers", "share"),
    [(12, None, 1, 12), (12, None, 5, 2), (4, None, 8, 1), (None, None, 2, 1), (12, 3, 5, 3)],
)
def test_cores_are_divided_among_sharers(
    cores: int | None, threads: int | None, sharers: int, share: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base.os, "cpu_count", lambda: cores)
    assert share_of_cores(threads, sharers) == share


def test_ranks_find_each_other_through_the_store() -> None:
    store = rendezvous_store()

    def connect(rank: int) -> bytes:
        client = TCPStore("127.0.0.1", store.port)
        client.set(f"rank {rank}", str(rank))
        return bytes(client.get(f"rank {1 - rank}"))

    with ThreadPoolExecutor() as ranks:
        assert list(ranks.map(connect, range(2))) == [b"1", b"0"]


@pytest.mark.parametrize(
    ("device", "ranks", "backend", "device_id"),
    [("cpu", 1, "gloo", None), ("cpu", 2, "gloo", None), ("cuda:0", 1, "nccl", None), ("cuda:0", 2, "nccl", "cuda:0")],
)
def test_ranks_rendezvous_once_with_their_devices_backend(
    monkeypatch: pytest.MonkeyPatch, device: str, ranks: int, backend: str, device_id: str | None
) -> None:
    groups: list[dict[str, Any]] = []
    monkeypatch.setattr(base, "init_process_group", lambda name, **kwargs: groups.append(kwargs | {"backend": name}))
    monkeypatch.setattr(base, "is_initialized", lambda: bool(groups))
    store = rendezvous_store()
    info = RendezvousInfo(rank=ranks - 1, world_size=ranks, master_address="127.0.0.1", master_port=store.port)
    for _ in range(2):
        info.join(torch.device(device))
    [group] = groups
    assert (group["backend"], group["rank"], group["world_size"]) == (backend, ranks - 1, ranks)
    assert group["device_id"] == (device_id and torch.device(device_id))
    assert group["store"].port == store.port
