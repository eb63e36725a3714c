"""A disk that is full, a real one of a few megabytes."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from othink_ray.driver import checkpoint
from othink_ray.driver.checkpoint import Checkpoints
from othink_ray.engines.learner_state import StoredState, Writing

STATE = replace(checkpoint.fresh(0), step=1)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Of 4 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"a small disk needs root: {mounted.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


class Learner:
    """Writes as many megabytes as it is told, as a rank does."""

    megabytes = 1

    def save(self, folder: Path) -> None:
        self.writing = Writing(folder, 0, {"a/weight": torch.ones(self.megabytes * 2**18)}, steps=1)

    def written(self) -> bool:
        return self.writing.over

    def saved(self) -> dict[str, str]:
        return self.writing.finish()


def test_a_checkpoint_without_room_is_told_and_the_last_whole_one_stays(small_disk: Path) -> None:
    told: list[str] = []
    learner = Learner()
    checkpoints = Checkpoints(small_disk, learner, keep_last=1, keep_best=False, tell=told.append)
    for step, learner.megabytes in ((1, 1), (2, 8), (3, 8), (4, 1)):
        checkpoints.begin(replace(STATE, step=step))
        checkpoints.finish()
        found, state = checkpoint.find(small_disk, "auto", 0, told.append)
        assert found is not None
        assert state.step == (1 if step < 4 else 4)
        assert StoredState(found).read("a", "weight").sum() == 2**18
    assert [text.partition(" could not be written")[0] for text in told] == ["checkpoint step_2", "checkpoint step_3"]
    assert all("No space left" in text and "the last whole one is step_1" in text for text in told)
    assert os.listdir(small_disk / "checkpoints") == ["step_4"]
