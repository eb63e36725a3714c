"""What is different in a run that was submitted as a job."""

from __future__ import annotations

from pathlib import Path

import pytest

from othink_ray.runtime.job import lasting, short_notice


def test_a_relative_folder_stays_when_ray_removes_its_copy_of_the_working_directory() -> None:
    copy = Path("/tmp/ray/session_1/runtime_resources/working_dir_files/_ray_pkg_1")
    assert lasting("runs/first", copy) == str(Path.home() / "runs/first")
    assert lasting("/disk/first", copy) == "/disk/first"
    assert lasting("runs/first", Path("/disk/checkout")) == "runs/first"


def test_only_a_job_with_seconds_to_end_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    assert short_notice() is None
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    told = short_notice()
    assert told is not None and "launch/job.yaml" in told
    monkeypatch.setenv("RAY_JOB_STOP_WAIT_TIME_S", "600")
    assert short_notice() is None
