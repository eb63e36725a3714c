"""One run a folder, and nothing of an older run in it that this one could mistake for its own."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from othink_ray.driver.run_dir import FolderError, lock_run_dir, set_aside_older, written_down

HOLD = """
import sys, pathlib
from othink_ray.driver.run_dir import lock_run_dir
with lock_run_dir(pathlib.Path(sys.argv[1])):
    print("mine", flush=True)
    sys.stdin.read()
"""


def test_a_second_run_is_refused_until_the_first_has_ended_in_whatever_way(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"mine\n"
        with pytest.raises(FolderError, match="another run is at work in it"), lock_run_dir(tmp_path):
            pass
        other.kill()
    with lock_run_dir(tmp_path):
        pass


def test_a_new_folder_is_its_owners_alone_and_one_that_was_there_keeps_its_mode(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o755)
    for name, mode in (("new", 0o700), ("shared", 0o755)):
        with lock_run_dir(tmp_path / name):
            assert stat.S_IMODE((tmp_path / name).stat().st_mode) == mode


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FolderError, match="cannot be written"), lock_run_dir(tmp_path / "file" / "run"):
        pass


def test_checkpoints_and_incidents_of_an_older_run_are_set_aside(tmp_path: Path) -> None:
    (tmp_path / "incidents.jsonl").write_text("{}")
    for step in (3, 5):
        (tmp_path / "checkpoints" / f"step_{step}").mkdir(parents=True)
        set_aside_older(tmp_path)
    assert not (tmp_path / "checkpoints").exists()
    assert (tmp_path / "incidents.discarded.jsonl").read_text() == "{}"
    assert [path.name for path in (tmp_path / "checkpoints.discarded").iterdir()] == ["step_5"]
    set_aside_older(tmp_path)


def test_what_happened_is_said_and_written_down_with_its_time(tmp_path: Path) -> None:
    said: list[str] = []
    tell = written_down(tmp_path, said.append)
    tell("one")
    tell("two")
    lines = [json.loads(line) for line in (tmp_path / "incidents.jsonl").read_text().splitlines()]
    assert [line["text"] for line in lines] == said == ["one", "two"]
    assert lines[0]["unix_s"] <= lines[1]["unix_s"]
    written_down(tmp_path / "nowhere", said.append)("three")
    assert said[-1] == "three"
