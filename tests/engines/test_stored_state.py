"""Checkpoint shards: written by each rank, read by name from the shards of all ranks."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from othink_ray.engines.learner_checkpoint import CheckpointWriter, StateError, StoredState

SHARDS = [
    {"a/weight": torch.arange(6.0).reshape(2, 3), "a/exp_avg": torch.ones(2, 3)},
    {"b/weight": torch.arange(4.0), "b/exp_avg": torch.zeros(4)},
]


@pytest.fixture
def stored(tmp_path: Path) -> StoredState:
    for rank, shard in enumerate(SHARDS):
        writer = CheckpointWriter(tmp_path, rank, shard, steps=3)
        digests = writer.finish()
        assert writer.done
        path = tmp_path / f"learner_{rank}.safetensors"
        assert digests == {path.name: hashlib.sha256(path.read_bytes()).hexdigest()}
    return StoredState(tmp_path)


def test_shards_of_all_ranks_are_read_by_name(stored: StoredState) -> None:
    assert stored.steps == 3
    for shard in SHARDS:
        for key, tensor in shard.items():
            name, _, kind = key.rpartition("/")
            assert torch.equal(stored.read(name, kind), tensor)


def test_a_checkpoint_of_another_network_is_refused(stored: StoredState) -> None:
    stored.require({"a": (2, 3), "b": torch.Size([4])})
    with pytest.raises(StateError, match=r"none missing, none unexpected, 1 parameters \(a\) of another shape"):
        stored.require({"a": (3, 2), "b": (4,)})
    with pytest.raises(StateError, match=r"1 parameters \(c\) missing, 1 parameters \(b\) unexpected, none of another"):
        stored.require({"a": (2, 3), "c": (4,)})


def test_a_shard_that_fails_to_write_raises_os_error(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path / "missing", 1, SHARDS[0], steps=3)
    with pytest.raises(OSError, match=r"^learner_1\.safetensors: "):
        writer.finish()
