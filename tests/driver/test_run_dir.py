"""A run folder is locked by one run, and files of an older run are set aside."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from othink_ray.driver.run_dir import FolderError, incident_log, lock_run_dir, set_aside_older

HOLD = """
import sys, pathlib
from othink_ray.driver.run_dir import lock_run_dir
with lock_run_dir(pathlib.Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_a_second_run_is_refused_until_the_first_is_dead(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"locked\n"
        with pytest.raises(FolderError, match="in use by another run"), lock_run_dir(tmp_path):
            pass
        other.kill()
    with lock_run_dir(tmp_path):
        pass


def test_a_new_folder_is_private_and_an_old_one_keeps_its_mode(tmp_path: Path) -> None:
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


def test_incidents_are_printed_and_written_with_their_time(tmp_path: Path) -> None:
    printed: list[str] = []
    log = incident_log(tmp_path, printed.append)
    log("one")
    log("two")
    lines = [json.loads(line) for line in (tmp_path / "incidents.jsonl").read_text().splitlines()]
    assert [line["text"] for line in lines] == printed == ["one", "two"]
    assert lines[0]["unix_s"] <= lines[1]["unix_s"]
    incident_log(tmp_path / "nowhere", printed.append)("three")
    assert printed[-1] == "three"
