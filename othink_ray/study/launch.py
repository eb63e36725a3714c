"""Launch the runs of a study in parallel, each as the command that a user would type."""

from __future__ import annotations

import ctypes
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from othink_ray.atomic_write import atomic_write

LAST_LINES = 3  # lines of a failed run's output that become its reason
STOP_SECONDS = 60  # grace period for clean-up
SAVE_SECONDS = 600  # grace period for a run to finish and save its step, the same as in launch/job.yaml
POLL_SECONDS = 0.2
_PR_SET_PDEATHSIG = 1  # Linux prctl option: signal sent to a process when the thread that created it ends
_prctl = ctypes.CDLL(None).prctl


class StudyError(RuntimeError):
    """Raised when the study cannot continue in its folder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One run of a study; its folder is `runs/<name>` in the study's folder."""

    name: str
    overrides: tuple[str, ...]
    output_file: str  # written to the run's folder by a run that completes
    base_overrides: tuple[str, ...] = ()  # overrides of the job that trains the model that this job starts from

    @property
    def identity(self) -> list[str]:
        """Sorted overrides of the run and of its base; equal lists mean the same run."""
        return [*sorted(self.overrides), *(f"base {override}" for override in sorted(self.base_overrides))]


@dataclass(frozen=True, slots=True, kw_only=True)
class JobOutcome:
    """Status of a job; `reason` is set if it failed, `seconds` once it ended."""

    status: str  # waiting | running | done | failed
    reason: str | None
    seconds: float | None


WAITING = JobOutcome(status="waiting", reason=None, seconds=None)
Running = dict[Job, tuple[subprocess.Popen[bytes], float]]


class RunLauncher:
    """Starts the jobs of a study and records their outcomes in its folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()

    def path(self, job: Job) -> Path:
        """Return the folder of a job."""
        return self.folder / "runs" / job.name

    def command(self, job: Job, start_from: Path | None = None) -> list[str]:
        """Return the command of a job; it resumes from the newest checkpoint if there is one."""
        paths = [assigned("run.dir", self.path(job)), "run.resume=auto"]
        paths += [assigned("model.path", start_from)] if start_from else []
        return [sys.executable, "-m", "othink_ray.main", *job.overrides, *paths]

    def shown_command(self, job: Job, start_from: Path | None = None) -> str:
        """Return the command of a job quoted for a shell, with `python` as the interpreter."""
        return shlex.join(["python", *self.command(job, start_from)[1:]])

    def outcome(self, job: Job) -> JobOutcome:
        """Return the recorded outcome, or `waiting` if no record counts.

        A record does not count if its run had different overrides, or is done but has lost its output file.
        """
        record = self._record_of(job)
        if record is None or record["identity"] != job.identity:
            return WAITING
        if record["status"] == "done" and not (self.path(job) / job.output_file).is_file():
            return WAITING
        return JobOutcome(status=record["status"], reason=record["reason"], seconds=record["seconds"])

    def run(
        self,
        jobs: Sequence[Job],
        parallel: int,
        on_outcome: Callable[[Job, JobOutcome], None],
        say: Callable[[str], None],
        start_from: Path | None = None,
    ) -> None:
        """Run the jobs that are not done, `parallel` at a time.

        A failed job does not stop the others; an interrupt stops all. `on_outcome` is called at every start and end.
        """
        waiting = [job for job in jobs if self.outcome(job).status != "done"]
        for job in waiting:
            self._refuse_if_running(job)
        running: Running = {}
        with _stopping(running, say):
            while waiting or running:
                while waiting and len(running) < parallel:
                    job = waiting.pop(0)
                    running[job] = (self._start(job, start_from), time.monotonic())
                    on_outcome(job, JobOutcome(status="running", reason=None, seconds=None))
                for job, (process, started) in list(running.items()):
                    if process.poll() is not None:
                        del running[job]
                        on_outcome(job, self._finish(job, process.returncode, time.monotonic() - started))
                time.sleep(POLL_SECONDS)

    def _start(self, job: Job, start_from: Path | None) -> subprocess.Popen[bytes]:
        folder = self.path(job)
        record = self._record_of(job)
        if record is not None and record["identity"] != job.identity:
            _rename_aside(folder)  # its checkpoints belong to a run with different overrides
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with (folder / "screen.txt").open("wb") as output:
            process = subprocess.Popen(
                self.command(job, start_from),
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C reaches only the study, which forwards it once
                preexec_fn=partial(_terminate_with_parent, os.getpid()),
            )
        self._write(job, JobOutcome(status="running", reason=None, seconds=None), pid=process.pid)
        return process

    def _finish(self, job: Job, code: int, seconds: float) -> JobOutcome:
        done = code == 0
        outcome = JobOutcome(
            status="done" if done else "failed",
            reason=None if done else self._failure_reason(job, code),
            seconds=seconds,
        )
        self._write(job, outcome, pid=None)
        if done:
            shutil.rmtree(self.path(job) / "checkpoints", ignore_errors=True)  # a study needs only the export
        return outcome

    def _write(self, job: Job, outcome: JobOutcome, *, pid: int | None) -> None:
        record = {
            "status": outcome.status,
            "reason": outcome.reason,
            "seconds": outcome.seconds,
            "pid": pid,
            "identity": job.identity,
        }
        atomic_write(self.path(job) / "outcome.json", json.dumps(record, indent=2) + "\n")

    def _record_of(self, job: Job) -> dict[str, Any] | None:
        try:
            record: dict[str, Any] = json.loads((self.path(job) / "outcome.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return record

    def _refuse_if_running(self, job: Job) -> None:
        """Raise if the run of a killed study is still finishing its step: two writers would corrupt the folder."""
        record = self._record_of(job)
        pid = record and record["pid"]
        if pid and str(self.path(job)) in _command_line(pid):
            raise StudyError(
                f"run {job.name} of an earlier study is still active as process {pid}: wait until it ends, then retry"
            )

    def _failure_reason(self, job: Job, code: int) -> str:
        output = (self.path(job) / "screen.txt").read_text(encoding="utf-8", errors="replace").splitlines()
        lines = [line.strip() for line in output if line.strip()]
        stopped = [line for line in lines if line.startswith("stopped:")]
        return f"exit status {code}: " + " | ".join(stopped[-1:] or lines[-LAST_LINES:])


def assigned(key: str, path: Path) -> str:
    """Return the override key="path", quoted because a path may contain characters of Hydra's grammar."""
    escaped = str(path).replace("\\", "\\\\").replace('"', '\\"')
    return f'{key}="{escaped}"'


def _terminate_with_parent(parent: int) -> None:
    """Make the calling process receive SIGTERM when its parent ends, however that happens; runs after fork."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        os._exit(143)


def _rename_aside(folder: Path) -> None:
    """Keep the folder of another run under a new name, `<name>.old-N`."""
    number = 1
    while (aside := folder.with_name(f"{folder.name}.old-{number}")).exists():
        number += 1
    folder.rename(aside)


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


@contextmanager
def _stopping(running: Running, say: Callable[[str], None]) -> Iterator[None]:
    """Stop the running processes on exit, whatever ends the study."""
    try:
        yield
    finally:
        if running:
            names = ", ".join(job.name for job in running)
            say(f"stopping {names}: each run finishes and saves its step; press Ctrl-C again to stop at once")
            stop_processes([process for process, _ in running.values()], SAVE_SECONDS)


def stop_processes(processes: Sequence[subprocess.Popen[bytes]], patience_s: float = STOP_SECONDS) -> None:
    """Stop processes that lead their own sessions: SIGTERM, on an interrupt a second one, SIGKILL when time is up."""
    for _ in range(2):
        for process in processes:
            process.terminate()
        try:
            return _wait(processes, patience_s)
        except KeyboardInterrupt:
            patience_s = STOP_SECONDS


def _wait(processes: Sequence[subprocess.Popen[bytes]], patience_s: float) -> None:
    deadline = time.monotonic() + patience_s
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
