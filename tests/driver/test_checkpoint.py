"""Checkpoints appear whole or not at all, and the newest whole one is found."""

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


class Writes:
    """A learner of one file."""

    done = True

    def save(self, folder: Path) -> None:
        (folder / "weights").write_text("whole")

    def written(self) -> bool:
        return self.done

    def saved(self) -> dict[str, str]:
        return {"weights": hashlib.sha256(b"whole").hexdigest()}


class RunsOutOfDisk(Writes):
    def saved(self) -> dict[str, str]:
        raise OSError(28, "No space left on device")


def kept(run_dir: Path, learner: Saves | None = None, *, last: int = 9, best: bool = False) -> Checkpoints:
    return Checkpoints(run_dir, learner or Writes(), keep_last=last, keep_best=best, tell=SAID.append)


SAID: list[str] = []


def write(checkpoints: Checkpoints, state: TrainState) -> Path:
    checkpoints.begin(state)
    checkpoints.finish()
    return checkpoints.folder / f"step_{state.step}"


def test_a_checkpoint_reads_back_as_it_was_written(tmp_path: Path) -> None:
    folder = write(kept(tmp_path), STATE)
    assert folder == tmp_path / "checkpoints" / "step_7"
    assert checkpoint.read(folder, seed=3) == STATE


def test_a_checkpoint_counts_only_when_it_is_finished(tmp_path: Path) -> None:
    checkpoints = kept(tmp_path)
    checkpoints.begin(STATE)
    assert checkpoint.find(tmp_path, "auto", 3, SAID.append)[0] is None
    checkpoints.begin(replace(STATE, step=8))
    assert checkpoint.find(tmp_path, "auto", 3, SAID.append)[0] == tmp_path / "checkpoints" / "step_7"


def test_a_run_does_not_wait_for_a_checkpoint_until_it_needs_the_next(tmp_path: Path) -> None:
    slow = Writes()
    slow.done = False
    checkpoints = kept(tmp_path, slow)
    checkpoints.begin(STATE)
    checkpoints.finish_if_written()
    assert checkpoint.find(tmp_path, "auto", 3, SAID.append)[0] is None
    slow.done = True
    checkpoints.finish_if_written()
    assert checkpoint.find(tmp_path, "auto", 3, SAID.append)[1] == STATE
    checkpoints.finish_if_written()


def test_a_full_disk_costs_a_checkpoint_but_neither_the_run_nor_the_last_one(tmp_path: Path) -> None:
    whole = write(kept(tmp_path), STATE)
    write(kept(tmp_path, RunsOutOfDisk()), replace(STATE, step=8))
    assert "checkpoint step_8 could not be written" in SAID[-1]
    assert "the last whole one is step_7" in SAID[-1]
    assert checkpoint.find(tmp_path, "auto", 3, SAID.append) == (whole, STATE)
    assert [path.name for path in whole.parent.iterdir()] == ["step_7"]


def test_what_a_killed_run_left_half_written_is_swept_away(tmp_path: Path) -> None:
    kept(tmp_path).begin(STATE)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_7.partial"]
    assert write(kept(tmp_path), replace(STATE, step=9)).is_dir()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_9"]


def test_the_newest_ones_and_the_best_one_are_kept(tmp_path: Path) -> None:
    checkpoints = kept(tmp_path, last=2, best=True)
    accuracies = [0.1, 0.9, 0.9, None, 0.5, None]
    for step, accuracy in enumerate(accuracies):
        write(checkpoints, replace(STATE, step=step, accuracy=accuracy))
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["step_2", "step_4", "step_5"]


def test_the_newest_is_the_one_of_the_latest_step_and_not_of_the_last_letter(tmp_path: Path) -> None:
    for step in (9, 10, 2):
        write(kept(tmp_path), replace(STATE, step=step))
    found, state = checkpoint.find(tmp_path, "auto", 3, SAID.append)
    assert found is not None
    assert found.name == "step_10"
    assert state.step == 10


def test_auto_starts_afresh_where_there_is_nothing_and_never_ignores_what_there_is(tmp_path: Path) -> None:
    beginning = (None, checkpoint.fresh(3))
    assert checkpoint.find(tmp_path, "auto", 3, SAID.append) == beginning
    write(kept(tmp_path), STATE)
    assert checkpoint.find(tmp_path, "never", 3, SAID.append) == beginning


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
def test_a_damaged_checkpoint_is_passed_over_by_auto_and_refused_by_name(tmp_path: Path, damage: str) -> None:
    whole = write(kept(tmp_path), STATE)
    newer = write(kept(tmp_path), replace(STATE, step=8))
    weights = newer / "weights"
    if damage == "gone":
        weights.unlink()
    else:
        weights.write_text({"flipped": "whale", "cut": "who"}[damage])
    assert checkpoint.find(tmp_path, "auto", 3, SAID.append) == (whole, STATE)
    assert "passed over" in SAID[-1] and "step_8" in SAID[-1]
    with pytest.raises(DamagedError, match="step_8"):
        checkpoint.find(tmp_path, str(newer), 3, SAID.append)


def test_going_on_with_another_seed_is_refused(tmp_path: Path) -> None:
    folder = write(kept(tmp_path), STATE)
    for resume in ("auto", str(folder)):
        with pytest.raises(ResumeError, match=r"Set train\.seed=3"):
            checkpoint.find(tmp_path, resume, 4, SAID.append)


@pytest.mark.parametrize("content", [None, '{"step": 3', '{"step": 3, "colour": "red"}', "[]"])
def test_a_folder_that_holds_no_checkpoint_is_named_with_a_way_out(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "state.json").write_text(content)
    with pytest.raises(ResumeError, match=r"holds no checkpoint that can be read .* run\.resume=never"):
        checkpoint.read(tmp_path, 0)
