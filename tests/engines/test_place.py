"""Where the ranks of a learner meet."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # documented

from othink_ray.engines.base import meeting_place


def test_nobody_else_gets_the_port_before_the_ranks_come() -> None:
    meeting = meeting_place()
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("", meeting.port))


def test_ranks_come_when_they_like_and_find_each_other() -> None:
    meeting = meeting_place()

    def come(rank: int) -> bytes:
        store = TCPStore("127.0.0.1", meeting.port)
        store.set(f"rank {rank}", str(rank))
        return bytes(store.get(f"rank {1 - rank}"))

    with ThreadPoolExecutor() as ranks:
        assert list(ranks.map(come, range(2))) == [b"1", b"0"]
