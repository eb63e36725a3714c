"""Runs as processes: real commands of the entry point, done, failed, kept and interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from othink_ray.study import launch
from othink_ray.study.launch import Job, Outcome, StudyError, Workshop

SOUND = Job(name="sound", overrides=("mode=check", "run.cache_dir=none"), leaves="screen.txt")
BROKEN = Job(name="broken", overrides=("mode=check", "algo.group_size=1"), leaves="screen.txt")


def made(workshop: Workshop, jobs: list[Job], parallel: int = 2) -> list[tuple[str, str]]:
    seen: list[tuple[str, str]] = []
    workshop.make(jobs, parallel, lambda job, outcome: seen.append((job.name, outcome.status)), print)
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
    changed = replace(SOUND, overrides=("mode=check", "run.cache_dir=none", "train.steps=9"))
    assert workshop.outcome(changed).status == "waiting"
    assert made(workshop, [changed])[-1] == ("sound", "done")
    assert not (workshop.path(changed) / "checkpoints").exists()
    assert (tmp_path / "runs" / "sound.old-1" / "checkpoints").is_dir()


def test_the_order_of_overrides_does_not_make_it_another_run_but_another_base_does(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path)
    job = replace(SOUND, overrides=("mode=check", "run.cache_dir=none", "train.steps=9"), stands_on=("train.steps=5",))
    made(workshop, [job])
    assert workshop.outcome(replace(job, overrides=job.overrides[::-1])).status == "done"
    assert workshop.outcome(replace(job, stands_on=("train.steps=6",))).status == "waiting"


def test_a_run_without_what_it_should_have_left_is_not_done(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path)
    made(workshop, [SOUND])
    assert workshop.outcome(replace(SOUND, leaves="summary.json")).status == "waiting"


def test_a_torn_record_costs_no_checkpoint(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path)
    made(workshop, [SOUND])
    (workshop.path(SOUND) / "outcome.json").write_text('{"status": "do')
    (workshop.path(SOUND) / "kept").touch()
    made(workshop, [SOUND])
    assert (workshop.path(SOUND) / "kept").exists()


def test_a_folder_may_have_any_name(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path / 'stu"dies (old), a=b')
    assert made(workshop, [SOUND])[-1] == ("sound", "done")


def test_a_run_that_an_earlier_study_left_alive_is_named_and_not_doubled(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path)
    made(workshop, [SOUND])
    alive = subprocess.Popen([sys.executable, "-c", "input()", str(workshop.path(SOUND))], stdin=subprocess.PIPE)
    try:
        record = json.loads((workshop.path(SOUND) / "outcome.json").read_text())
        (workshop.path(SOUND) / "outcome.json").write_text(json.dumps(record | {"status": "running", "pid": alive.pid}))
        with pytest.raises(StudyError, match=f"sound still runs.* as process {alive.pid}"):
            made(workshop, [SOUND])
    finally:
        alive.communicate(b"\n")
    assert made(workshop, [SOUND])[-1] == ("sound", "done")


def test_an_interrupted_study_leaves_no_process_and_goes_on_later(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path)

    def interrupt(job: Job, outcome: Outcome) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        workshop.make([SOUND], 1, interrupt, print)
    record = json.loads((workshop.path(SOUND) / "outcome.json").read_text())
    assert record["status"] == "running"
    assert not Path(f"/proc/{record['pid']}").exists()
    assert made(workshop, [SOUND])[-1] == ("sound", "done")


STUDY = """
import sys
from pathlib import Path
from othink_ray.study.launch import Job, Workshop
job = Job(name="long", overrides=("train.steps=100000",), leaves="screen.txt")
Workshop(Path(sys.argv[1])).make([job], 1, lambda job, outcome: print(outcome.status, flush=True), print)
"""


def test_the_runs_of_a_study_that_is_killed_are_asked_to_end(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", STUDY, str(tmp_path)], stdout=subprocess.PIPE) as study:
        assert study.stdout is not None and study.stdout.readline() == b"running\n"
        [run] = psutil.Process(study.pid).children()
        study.kill()
    gone, alive = psutil.wait_procs([run], timeout=60)
    for process in alive:
        os.killpg(process.pid, 9)
    assert gone, (tmp_path / "runs" / "long" / "screen.txt").read_text()


SLOW = """
import signal, sys, time
asked = []
signal.signal(signal.SIGTERM, lambda *of: asked.append(1))
print("up", flush=True)
while len(asked) < int(sys.argv[1]):
    time.sleep(0.05)
"""


def slow(requests: int) -> subprocess.Popen[bytes]:
    """A process that ends at so many SIGTERMs."""
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, str(requests)], stdout=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout is not None and process.stdout.readline() == b"up\n"
    return process


def test_a_second_interrupt_ends_runs_at_once_and_a_stubborn_one_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "STOP_SECONDS", 5.0)
    processes = [slow(1), slow(2), slow(3)]
    main = threading.get_ident()
    interrupt = threading.Timer(1.0, lambda: signal.pthread_kill(main, signal.SIGINT))
    interrupt.start()
    launch.end(processes, patience_s=60)
    assert [process.returncode for process in processes] == [0, 0, -9]
