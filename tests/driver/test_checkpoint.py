"""Checkpoints are complete or absent, and the newest complete one is found."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest

from othink_ray.driver import checkpoint
from othink_ray.driver.checkpoint import Checkpoints, DamagedError, ResumeError, Saves
from othink_ray.types import TrainState

STATE = TrainState(
    step=7, data_position=112, schedule_state={"beta": 0.05}, seed=3, before={"counting": {"accuracy": 0.5}}
)


class FileLearner:
    """A learner with a state of one file."""

    done = True

    def save(self, folder: Path) -> None:
        (folder / "weights").write_text("whole")

    def save_is_written(self) -> bool:
        return self.done

    def finish_save(self) -> dict[str, str]:
        return {"weights": hashlib.sha256(b"whole").hexdigest()}


class FullDiskLearner(FileLearner):
    def finish_save(self) -> dict[str, str]:
        raise OSError(28, "No space left on device")


def checkpoints_in(run_dir: Path, learner: Saves | None = None, *, last: int = 9, best: bool = False) -> Checkpoints:
    return Checkpoints(run_dir, learner or FileLearner(), keep_last=last, keep_best=best, log=LOG.append)


LOG: list[str] = []


def write(checkpoints: Checkpoints, state: TrainState) -> Path:
    checkpoints.begin(state)
    checkpoints.finish()
    return checkpoints.folder / f"step_{state.step}"


def test_a_checkpoint_reads_back_as_it_was_written(tmp_path: Path) -> None:
    folder = write(checkpoints_in(tmp_path), STATE)
    assert folder == tmp_path / "checkpoints" / "step_7"
    assert checkpoint.read(folder, seed=3) == STATE


def test_a_checkpoint_counts_only_when_it_is_finished(tmp_path: Path) -> None:
    checkpoints = checkpoints_in(tmp_path)
    checkpoints.begin(STATE)
    assert checkpoint.find(tmp_path, "auto", 3, LOG.append)[0] is None
    checkpoints.begin(replace(STATE, step=8))
    assert checkpoint.find(tmp_path, "auto", 3, LOG.append)[0] == tmp_path / "checkpoints" / "step_7"


def test_a_slow_checkpoint_does_not_block_the_run(tmp_path: Path) -> None:
    slow = FileLearner()
    slow.done = False
    checkpoints = checkpoints_in(tmp_path, slow)
    checkpoints.begin(STATE)
    checkpoints.finish_if_written()
    assert checkpoint.find(tmp_path, "auto", 3, LOG.append)[0] is None
    slow.done = True
    checkpoints.finish_if_written()
    assert checkpoint.find(tmp_path, "auto", 3, LOG.append)[1] == STATE
    checkpoints.finish_if_written()


def test_a_full_disk_loses_only_the_checkpoint_being_written(tmp_path: Path) -> None:
    whole = write(checkpoints_in(tmp_path), STATE)
    write(checkpoints_in(tmp_path, FullDiskLearner()), replace(STATE, step=8))
    assert "checkpoint step_8 could not be written" in LOG[-1]
    assert "the last complete one is step_7" in LOG[-1]
    assert checkpoint.find(tmp_path, "auto", 3, LOG.append) == (whole, STATE)
    assert [path.name for path in whole.parent.iterdir()] == ["step_7"]


def test_partial_checkpoints_of_a_killed_run_are_deleted(tmp_path: Path) -> None:
    checkpoints_in(tmp_path).begin(STATE)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_7.partial"]
    assert write(checkpoints_in(tmp_path), replace(STATE, step=9)).is_dir()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_9"]


def test_the_newest_checkpoints_and_the_best_one_are_kept(tmp_path: Path) -> None:
    checkpoints = checkpoints_in(tmp_path, last=2, best=True)
    accuracies = [0.1, 0.9, 0.9, None, 0.5, None]
    for step, accuracy in enumerate(accuracies):
        write(checkpoints, replace(STATE, step=step, accuracy=accuracy))
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["step_2", "step_4", "step_5"]


def test_the_newest_checkpoint_is_found_by_number_not_by_name(tmp_path: Path) -> None:
    for step in (9, 10, 2):
        write(checkpoints_in(tmp_path), replace(STATE, step=step))
    found, state = checkpoint.find(tmp_path, "auto", 3, LOG.append)
    assert found is not None
    assert found.name == "step_10"
    assert state.step == 10


def test_auto_without_checkpoints_and_never_start_afresh(tmp_path: Path) -> None:
    beginning = (None, checkpoint.fresh(3))
    assert checkpoint.find(tmp_path, "auto", 3, LOG.append) == beginning
    write(checkpoints_in(tmp_path), STATE)
    assert checkpoint.find(tmp_path, "never", 3, LOG.append) == beginning


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
def test_auto_skips_a_damaged_checkpoint_and_a_path_refuses_it(tmp_path: Path, damage: str) -> None:
    whole = write(checkpoints_in(tmp_path), STATE)
    newer = write(checkpoints_in(tmp_path), replace(STATE, step=8))
    weights = newer / "weights"
    if damage == "gone":
        weights.unlink()
    else:
        weights.write_text({"flipped": "whale", "cut": "who"}[damage])
    assert checkpoint.find(tmp_path, "auto", 3, LOG.append) == (whole, STATE)
    assert "skipping a checkpoint" in LOG[-1] and "step_8" in LOG[-1]
    with pytest.raises(DamagedError, match="step_8"):
        checkpoint.find(tmp_path, str(newer), 3, LOG.append)


def test_resuming_with_another_seed_is_refused(tmp_path: Path) -> None:
    folder = write(checkpoints_in(tmp_path), STATE)
    for resume in ("auto", str(folder)):
        with pytest.raises(ResumeError, match=r"Set train\.seed=3"):
            checkpoint.find(tmp_path, resume, 4, LOG.append)


@pytest.mark.parametrize("content", [None, '{"step": 3', '{"step": 3, "colour": "red"}', "[]"])
def test_an_unreadable_checkpoint_is_refused_with_a_remedy(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "state.json").write_text(content)
    with pytest.raises(ResumeError, match=r"holds no readable checkpoint .* run\.resume=never"):
        checkpoint.read(tmp_path, 0)
