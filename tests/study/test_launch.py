"""Runs as processes, with real commands of the entry point: done, failed, kept and interrupted."""

from __future__ import annotations

import json
import os
import shutil
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


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a study that did `SOUND`; read-only."""
    folder = tmp_path_factory.mktemp("study")
    assert run_jobs(RunLauncher(folder), [SOUND])[-1] == ("sound", "done")
    return folder


@pytest.fixture
def did_sound(study: Path, tmp_path: Path) -> RunLauncher:
    """Return the launcher of a copy of that study."""
    return RunLauncher(shutil.copytree(study, tmp_path / "study"))


def test_a_failed_run_has_a_reason_and_stops_no_other(tmp_path: Path) -> None:
    launcher = RunLauncher(tmp_path)
    outcomes = run_jobs(launcher, [BROKEN, SOUND])
    assert sorted(outcomes) == [("broken", "failed"), ("broken", "running"), ("sound", "done"), ("sound", "running")]
    reason = launcher.outcome(BROKEN).reason
    assert reason is not None and "exit status 2" in reason and "Set algo.group_size=8" in reason
    assert launcher.outcome(SOUND).reason is None


def test_done_runs_are_kept_and_failed_runs_are_retried(did_sound: RunLauncher) -> None:
    run_jobs(did_sound, [BROKEN, SOUND])
    assert did_sound.outcome(BROKEN).status == "failed"
    assert {name for name, _ in run_jobs(did_sound, [BROKEN, SOUND])} == {"broken"}


def test_a_run_with_other_overrides_starts_afresh(did_sound: RunLauncher) -> None:
    (did_sound.path(SOUND) / "checkpoints").mkdir()
    changed = replace(SOUND, overrides=("mode=check", "run.cache_dir=none", "train.steps=9"))
    assert did_sound.outcome(changed).status == "waiting"
    assert run_jobs(did_sound, [changed])[-1] == ("sound", "done")
    assert not (did_sound.path(changed) / "checkpoints").exists()
    assert (did_sound.path(SOUND).with_name("sound.old-1") / "checkpoints").is_dir()


def test_identity_ignores_override_order_but_not_the_base(tmp_path: Path) -> None:
    launcher = RunLauncher(tmp_path)
    job = replace(
        SOUND, overrides=("mode=check", "run.cache_dir=none", "train.steps=9"), base_overrides=("train.steps=5",)
    )
    run_jobs(launcher, [job])
    assert launcher.outcome(replace(job, overrides=job.overrides[::-1])).status == "done"
    assert launcher.outcome(replace(job, base_overrides=("train.steps=6",))).status == "waiting"


def test_a_run_without_its_output_file_is_not_done(did_sound: RunLauncher) -> None:
    assert did_sound.outcome(SOUND).status == "done"
    assert did_sound.outcome(replace(SOUND, output_file="summary.json")).status == "waiting"


def test_a_truncated_record_loses_no_checkpoint(did_sound: RunLauncher) -> None:
    (did_sound.path(SOUND) / "outcome.json").write_text('{"status": "do')
    (did_sound.path(SOUND) / "kept").touch()
    assert run_jobs(did_sound, [SOUND])[-1] == ("sound", "done")
    assert (did_sound.path(SOUND) / "kept").exists()


def test_a_folder_may_have_any_name(tmp_path: Path) -> None:
    launcher = RunLauncher(tmp_path / 'stu"dies (old), a=b')
    assert run_jobs(launcher, [SOUND])[-1] == ("sound", "done")


def test_a_run_still_active_from_an_earlier_study_is_refused(did_sound: RunLauncher) -> None:
    alive = subprocess.Popen([sys.executable, "-c", "input()", str(did_sound.path(SOUND))], stdin=subprocess.PIPE)
    try:
        record = json.loads((did_sound.path(SOUND) / "outcome.json").read_text())
        (did_sound.path(SOUND) / "outcome.json").write_text(
            json.dumps(record | {"status": "running", "pid": alive.pid})
        )
        with pytest.raises(StudyError, match=f"run sound of an earlier study is still active as process {alive.pid}"):
            run_jobs(did_sound, [SOUND])
    finally:
        alive.communicate(b"\n")
    assert run_jobs(did_sound, [SOUND])[-1] == ("sound", "done")


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
    launch.stop_processes(processes, patience_s=60)
    assert [process.returncode for process in processes] == [0, 0, -9]
