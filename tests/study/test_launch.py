"""Runs as processes, with real commands of the entry point: done, failed, kept and interrupted."""

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
from othink_ray.study.launch import Job, JobOutcome, RunLauncher, StudyError

SOUND = Job(name="sound", overrides=("mode=check", "run.cache_dir=none"), output_file="screen.txt")
BROKEN = Job(name="broken", overrides=("mode=check", "algo.group_size=1"), output_file="screen.txt")


def run_jobs(launcher: RunLauncher, jobs: list[Job], parallel: int = 2) -> list[tuple[str, str]]:
    """Run the jobs and return the (name, status) of every reported outcome."""
    outcomes: list[tuple[str, str]] = []
    launcher.run(jobs, parallel, lambda job, outcome: outcomes.append((job.name, outcome.status)), print)
    return outcomes


def test_a_failed_run_has_a_reason_and_stops_no_other(tmp_path: Path) -> None:
    launcher = RunLauncher(tmp_path)
    outcomes = run_jobs(launcher, [BROKEN, SOUND])
    assert sorted(outcomes) == [("broken", "failed"), ("broken", "running"), ("sound", "done"), ("sound", "running")]
    reason = launcher.outcome(BROKEN).reason
    assert reason is not None and "exit status 2" in reason and "Set algo.group_size=8" in reason
    assert launcher.outcome(SOUND).reason is None


def test_done_runs_are_kept_and_failed_runs_are_retried(tmp_path: Path) -> None:
    launcher = RunLauncher(tmp_path)
    run_jobs(launcher, [BROKEN, SOUND])
    assert {name for name, _ in run_jobs(launcher, [BROKEN, SOUND])} == {"broken"}


def test_a_run_with_other_overrides_starts_afresh(tmp_path: Path) -> None:
    launcher = RunLauncher(tmp_path)
    run_jobs(launcher, [SOUND])
    (launcher.path(SOUND) / "checkpoints").mkdir()
    changed = replace(SOUND, overrides=("mode=check", "run.cache_dir=none", "train.steps=9"))
    assert launcher.outcome(changed).status == "waiting"
    assert run_jobs(launcher, [changed])[-1] == ("sound", "done")
    assert not (launcher.path(changed) / "checkpoints").exists()
    assert (tmp_path / "runs" / "sound.old-1" / "checkpoints").is_dir()


def test_identity_ignores_override_order_but_not_the_base(tmp_path: Path) -> None:
    launcher = RunLauncher(tmp_path)
    job = replace(
        SOUND, overrides=("mode=check", "run.cache_dir=none", "train.steps=9"), base_overrides=("train.steps=5",)
    )
    run_jobs(launcher, [job])
    assert launcher.outcome(replace(job, overrides=job.overrides[::-1])).status == "done"
    assert launcher.outcome(replace(job, base_overrides=("train.steps=6",))).status == "waiting"


@pytest.mark.slow
def test_a_run_without_its_output_file_is_not_done(tmp_path: Path) -> None:
    launcher = RunLauncher(tmp_path)
    run_jobs(launcher, [SOUND])
    assert launcher.outcome(replace(SOUND, output_file="summary.json")).status == "waiting"


@pytest.mark.slow
def test_a_truncated_record_loses_no_checkpoint(tmp_path: Path) -> None:
    launcher = RunLauncher(tmp_path)
    run_jobs(launcher, [SOUND])
    (launcher.path(SOUND) / "outcome.json").write_text('{"status": "do')
    (launcher.path(SOUND) / "kept").touch()
    run_jobs(launcher, [SOUND])
    assert (launcher.path(SOUND) / "kept").exists()


def test_a_folder_may_have_any_name(tmp_path: Path) -> None:
    launcher = RunLauncher(tmp_path / 'stu"dies (old), a=b')
    assert run_jobs(launcher, [SOUND])[-1] == ("sound", "done")


@pytest.mark.slow
def test_a_run_still_active_from_an_earlier_study_is_refused(tmp_path: Path) -> None:
    launcher = RunLauncher(tmp_path)
    run_jobs(launcher, [SOUND])
    alive = subprocess.Popen([sys.executable, "-c", "input()", str(launcher.path(SOUND))], stdin=subprocess.PIPE)
    try:
        record = json.loads((launcher.path(SOUND) / "outcome.json").read_text())
        (launcher.path(SOUND) / "outcome.json").write_text(json.dumps(record | {"status": "running", "pid": alive.pid}))
        with pytest.raises(StudyError, match=f"run sound of an earlier study is still active as process {alive.pid}"):
            run_jobs(launcher, [SOUND])
    finally:
        alive.communicate(b"\n")
    assert run_jobs(launcher, [SOUND])[-1] == ("sound", "done")


def test_an_interrupted_study_leaves_no_process_and_resumes(tmp_path: Path) -> None:
    launcher = RunLauncher(tmp_path)

    def interrupt(job: Job, outcome: JobOutcome) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        launcher.run([SOUND], 1, interrupt, print)
    record = json.loads((launcher.path(SOUND) / "outcome.json").read_text())
    assert record["status"] == "running"
    assert not Path(f"/proc/{record['pid']}").exists()
    assert run_jobs(launcher, [SOUND])[-1] == ("sound", "done")


STUDY = """
import sys
from pathlib import Path
from othink_ray.study.launch import Job, RunLauncher
job = Job(name="long", overrides=("train.steps=100000",), output_file="screen.txt")
RunLauncher(Path(sys.argv[1])).run([job], 1, lambda job, outcome: print(outcome.status, flush=True), print)
"""


def test_runs_get_sigterm_when_their_study_is_killed(tmp_path: Path) -> None:
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
received = []
signal.signal(signal.SIGTERM, lambda *_: received.append(1))
print("up", flush=True)
while len(received) < int(sys.argv[1]):
    time.sleep(0.05)
"""


def process_ending_after(signals: int) -> subprocess.Popen[bytes]:
    """Start a process that ends after that many SIGTERMs."""
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, str(signals)], stdout=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout is not None and process.stdout.readline() == b"up\n"
    return process


@pytest.mark.slow
def test_a_second_interrupt_sends_sigterm_again_then_sigkill(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "STOP_SECONDS", 5.0)
    processes = [process_ending_after(1), process_ending_after(2), process_ending_after(3)]
    main = threading.get_ident()
    interrupt = threading.Timer(1.0, lambda: signal.pthread_kill(main, signal.SIGINT))
    interrupt.start()
    launch.end(processes, patience_s=60)
    assert [process.returncode for process in processes] == [0, 0, -9]
