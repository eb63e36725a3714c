"""Where the ranks of a learner meet, and how many cores are each one's."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pytest
import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # documented

from othink_ray.engines import base
from othink_ray.engines.base import RendezvousInfo, rendezvous_info, share_of_cores


def test_it_listens_where_it_was_told_and_nowhere_else() -> None:
    for address in ("127.0.0.1", "127.0.0.2"):
        meeting = rendezvous_info(address)
        listening = {one.laddr for one in psutil.Process().net_connections() if one.status == psutil.CONN_LISTEN}
        assert [found.ip for found in listening if found.port == meeting.port] == [address]


def test_nobody_else_gets_the_port_before_the_ranks_come() -> None:
    meeting = rendezvous_info()
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("", meeting.port))


@pytest.mark.parametrize(
    ("cores", "threads", "sharers", "share"),
    [(12, None, 1, 12), (12, None, 5, 2), (4, None, 8, 1), (None, None, 2, 1), (12, 3, 5, 3)],
)
def test_cores_are_shared_out(
    cores: int | None, threads: int | None, sharers: int, share: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base.os, "cpu_count", lambda: cores)
    assert share_of_cores(threads, sharers) == share


def test_ranks_come_when_they_like_and_find_each_other() -> None:
    meeting = rendezvous_info()

    def come(rank: int) -> bytes:
        store = TCPStore("127.0.0.1", meeting.port)
        store.set(f"rank {rank}", str(rank))
        return bytes(store.get(f"rank {1 - rank}"))

    with ThreadPoolExecutor() as ranks:
        assert list(ranks.map(come, range(2))) == [b"1", b"0"]


@pytest.mark.parametrize(
    ("device", "ranks", "backend", "device_id"),
    [("cpu", 1, "gloo", None), ("cpu", 2, "gloo", None), ("cuda:0", 1, "nccl", None), ("cuda:0", 2, "nccl", "cuda:0")],
)
def test_ranks_meet_once_over_what_their_device_has(
    monkeypatch: pytest.MonkeyPatch, device: str, ranks: int, backend: str, device_id: str | None
) -> None:
    met: list[dict[str, Any]] = []
    monkeypatch.setattr(base, "init_process_group", lambda name, **how: met.append(how | {"backend": name}))
    monkeypatch.setattr(base, "is_initialized", lambda: bool(met))
    meeting = rendezvous_info()
    place = RendezvousInfo(rank=ranks - 1, world_size=ranks, master_address="127.0.0.1", master_port=meeting.port)
    for _ in range(2):
        place.rendezvous(torch.device(device))
    [how] = met
    assert (how["backend"], how["rank"], how["world_size"]) == (backend, ranks - 1, ranks)
    assert how["device_id"] == (device_id and torch.device(device_id))
    assert how["store"].port == meeting.port
