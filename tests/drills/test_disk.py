"""Behavior on a full disk, with a real file system of a few megabytes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from othink_ray.driver import checkpoint
from othink_ray.driver.checkpoint import Checkpoints
from othink_ray.driver.metrics import StepLines
from othink_ray.driver.run import _message
from othink_ray.engines.learner_checkpoint import CheckpointWriter, StoredState
from othink_ray.runtime.futures import WorkerFailed
from tests.drills.environment import full, small_disk

STATE = replace(checkpoint.fresh(0), step=1)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of 4 MB."""
    if os.geteuid() != 0:
        pytest.skip("a small disk needs root")
    with small_disk(tmp_path / "disk", megabytes=4):
        yield tmp_path / "disk"


class Learner:
    """Writes a checkpoint of `megabytes`, as a rank does."""

    megabytes = 1

    def save(self, folder: Path) -> None:
        self.writing = CheckpointWriter(folder, 0, {"a/weight": torch.ones(self.megabytes * 2**18)}, steps=1)

    def save_is_written(self) -> bool:
        return self.writing.done

    def finish_save(self) -> dict[str, str]:
        return self.writing.finish()


def test_a_checkpoint_without_room_leaves_the_last_whole_one(disk: Path) -> None:
    logged: list[str] = []
    learner = Learner()
    checkpoints = Checkpoints(disk, learner, keep_last=1, keep_best=False, log=logged.append)
    for step, learner.megabytes in ((1, 1), (2, 8), (3, 8), (4, 1)):
        checkpoints.begin(replace(STATE, step=step))
        checkpoints.finish()
        found, state = checkpoint.find(disk, "auto", 0, logged.append)
        assert found is not None
        assert state.step == (1 if step < 4 else 4)
        assert StoredState(found).read("a", "weight").sum() == 2**18
    assert [text.partition(" could not be written")[0] for text in logged] == ["checkpoint step_2", "checkpoint step_3"]
    assert all("No space left" in text and "the last complete one is step_1" in text for text in logged)
    assert os.listdir(disk / "checkpoints") == ["step_4"]


def test_records_wait_for_disk_space_and_none_is_torn_or_lost(disk: Path) -> None:
    logged: list[str] = []
    written = StepLines(disk / "metrics.jsonl", -1, logged.append)
    long = "x" * 3000  # some fit on the last page, the next one only in part
    records = [json.dumps({"step": step, "long": long}) for step in range(12)]
    for record in records[:3]:
        written.append(record)
    with full(disk):
        for record in records[3:9]:
            written.append(record)
            there = (disk / "metrics.jsonl").read_text().splitlines()
            assert there == records[: len(there)]
        assert len(there) < 9
    for record in records[9:]:
        written.append(record)
    written.close()
    assert (disk / "metrics.jsonl").read_text().splitlines() == records
    assert len(logged) == 2
    assert "no space left on the disk" in logged[0] and "written again" in logged[1]


def test_a_full_disk_is_named_with_its_remedy_in_one_line(disk: Path) -> None:
    failed = WorkerFailed("the learner (export) failed: OSError(28, 'No space left on device')\n  File ...\n  ^^^^")
    with full(disk):
        text = _message(failed, disk)
    assert text.startswith("the learner (export) failed: ") and "\n" not in text
    assert f"; free space in {disk}, then the same command with run.resume=auto resumes the run" in text
    assert _message(WorkerFailed("another\nfailure"), disk) == "another\nfailure"


def test_records_do_not_wait_forever(disk: Path) -> None:
    written = StepLines(disk / "metrics.jsonl", -1, lambda text: None)
    with full(disk), pytest.raises(OSError, match="No space left"):
        for step in range(2000):
            written.append(json.dumps({"step": step, "long": "x" * 300}))
    written.close()
