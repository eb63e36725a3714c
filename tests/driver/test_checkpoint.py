"""Checkpoints appear whole or not at all, and the newest whole one is found."""

from __future__ import annotations

from pathlib import Path

import pytest

from othink_ray.driver import checkpoint
from othink_ray.types import TrainState

STATE = TrainState(
    step=7, data_position=112, schedule_state={"beta": 0.05}, seed=3, before={"counting": {"accuracy": 0.5}}
)


class Saves:
    def save(self, folder: Path) -> None:
        (folder / "weights").write_text("whole")


class RunsOutOfDisk:
    def save(self, folder: Path) -> None:
        (folder / "weights").write_text("ha")
        raise OSError("no space left on device")


def test_a_checkpoint_reads_back_as_it_was_written(tmp_path: Path) -> None:
    folder = checkpoint.write(tmp_path, STATE, Saves())
    assert folder == tmp_path / "checkpoints" / "step_7"
    assert checkpoint.read(folder, seed=3) == STATE


def test_a_checkpoint_that_could_not_be_finished_is_never_found(tmp_path: Path) -> None:
    whole = checkpoint.write(tmp_path, STATE, Saves())
    later = TrainState(step=8, data_position=128, schedule_state={}, seed=3, before={})
    with pytest.raises(OSError, match="no space"):
        checkpoint.write(tmp_path, later, RunsOutOfDisk())
    assert checkpoint.find(tmp_path, "auto") == whole


def test_the_newest_is_the_one_of_the_latest_step_and_not_of_the_last_letter(tmp_path: Path) -> None:
    for step in (9, 10, 2):
        checkpoint.write(
            tmp_path, TrainState(step=step, data_position=0, schedule_state={}, seed=0, before={}), Saves()
        )
    found = checkpoint.find(tmp_path, "auto")
    assert found is not None
    assert found.name == "step_10"


def test_auto_starts_afresh_where_there_is_nothing_and_never_ignores_what_there_is(tmp_path: Path) -> None:
    assert checkpoint.find(tmp_path, "auto") is None
    checkpoint.write(tmp_path, STATE, Saves())
    assert checkpoint.find(tmp_path, "never") is None


def test_going_on_with_another_seed_is_refused(tmp_path: Path) -> None:
    folder = checkpoint.write(tmp_path, STATE, Saves())
    with pytest.raises(checkpoint.ResumeError, match=r"Set train\.seed=3"):
        checkpoint.read(folder, seed=4)


@pytest.mark.parametrize("content", [None, '{"step": 3', '{"step": 3, "colour": "red"}', "[]"])
def test_a_folder_that_holds_no_checkpoint_is_named_with_a_way_out(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "state.json").write_text(content)
    with pytest.raises(checkpoint.ResumeError, match=r"holds no checkpoint that can be read .* run\.resume=never"):
        checkpoint.read(tmp_path, 0)
