"""Runs as processes: real commands of the entry point, done, failed, kept and interrupted."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest

from othink_ray.study.launch import Job, Outcome, Workshop

SOUND = Job(name="sound", overrides=("mode=check",))
BROKEN = Job(name="broken", overrides=("mode=check", "algo.group_size=1"))


def made(workshop: Workshop, jobs: list[Job], parallel: int = 2) -> list[tuple[str, str]]:
    seen: list[tuple[str, str]] = []
    workshop.make(jobs, parallel, lambda job, outcome: seen.append((job.name, outcome.status)))
    return seen


def test_a_failed_run_says_why_and_stops_no_other(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path)
    seen = made(workshop, [BROKEN, SOUND])
    assert sorted(seen) == [("broken", "failed"), ("broken", "running"), ("sound", "done"), ("sound", "running")]
    reason = workshop.outcome(BROKEN).reason
    assert reason is not None and "exit status 2" in reason and "Set algo.group_size=8" in reason
    assert workshop.outcome(SOUND).reason is None


def test_what_is_done_is_kept_and_what_failed_is_tried_again(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path)
    made(workshop, [BROKEN, SOUND])
    assert {name for name, _ in made(workshop, [BROKEN, SOUND])} == {"broken"}


def test_other_overrides_make_it_another_run_that_starts_afresh(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path)
    made(workshop, [SOUND])
    (workshop.path(SOUND) / "checkpoints").mkdir()
    changed = Job(name="sound", overrides=("mode=check", "train.steps=9"))
    assert workshop.outcome(changed).status == "waiting"
    assert made(workshop, [changed])[-1] == ("sound", "done")
    assert not (workshop.path(changed) / "checkpoints").exists()


def test_an_interrupted_study_leaves_no_process_and_goes_on_later(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path)

    def interrupt(job: Job, outcome: Outcome) -> None:
        raise KeyboardInterrupt

    threads = threading.active_count()
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        workshop.make([SOUND], 1, interrupt)
    assert time.monotonic() - started < 30 and threading.active_count() == threads
    record = json.loads((workshop.path(SOUND) / "outcome.json").read_text())
    assert record["status"] == "running"
    assert made(workshop, [SOUND])[-1] == ("sound", "done")
