"""Makes the runs of a study, several side by side, each as the command that a person would type."""

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

LAST_LINES = 3  # of a failed run's output, as its reason
STOP_SECONDS = 60  # for a process to clean up
SAVE_SECONDS = 600  # for a run to finish its step and save it, as launch/job.yaml gives a job
POLL_SECONDS = 0.2
_PR_SET_PDEATHSIG = 1  # of Linux's prctl: the signal that a process gets when the thread that created it ends
_prctl = ctypes.CDLL(None).prctl


class StudyError(RuntimeError):
    """The study cannot go on in this folder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One run of the list: its folder is `runs/<name>` in that of the study."""

    name: str
    overrides: tuple[str, ...]
    leaves: str  # the file that a run which is done has left in its folder
    stands_on: tuple[str, ...] = ()  # the overrides of the job whose model it starts from

    @property
    def identity(self) -> list[str]:
        """The sorted overrides of the run and of its base; equal lists mean the same run."""
        return [*sorted(self.overrides), *(f"base {one}" for one in sorted(self.stands_on))]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a job stands."""

    status: str  # waiting | running | done | failed
    reason: str | None
    seconds: float | None


NOT_YET = Outcome(status="waiting", reason=None, seconds=None)
Running = dict[Job, tuple[subprocess.Popen[bytes], float]]


class Workshop:
    """The study's folder with its runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()

    def path(self, job: Job) -> Path:
        return self.folder / "runs" / job.name

    def command(self, job: Job, start_from: Path | None = None) -> list[str]:
        """The run as a command; it goes on from its newest checkpoint where there is one."""
        own = [assigned("run.dir", self.path(job)), "run.resume=auto"]
        own += [assigned("model.path", start_from)] if start_from else []
        return [sys.executable, "-m", "othink_ray.main", *job.overrides, *own]

    def shown_command(self, job: Job, start_from: Path | None = None) -> str:
        return shlex.join(["python", *self.command(job, start_from)[1:]])

    def outcome(self, job: Job) -> Outcome:
        """The recorded outcome of the job; waiting where there is none, or it is of a run with other overrides."""
        record = self._record_of(job)
        if record is None or record["identity"] != job.identity:
            return NOT_YET
        if record["status"] == "done" and not (self.path(job) / job.leaves).is_file():
            return NOT_YET
        return Outcome(status=record["status"], reason=record["reason"], seconds=record["seconds"])

    def make(
        self,
        jobs: Sequence[Job],
        parallel: int,
        watch: Callable[[Job, Outcome], None],
        say: Callable[[str], None],
        start_from: Path | None = None,
    ) -> None:
        """Runs those that are not done; a failed one does not stop the others, an interrupt stops all."""
        waiting = [job for job in jobs if self.outcome(job).status != "done"]
        for job in waiting:
            self._refuse_a_living_one(job)
        running: Running = {}
        with _stopping(running, say):
            while waiting or running:
                while waiting and len(running) < parallel:
                    job = waiting.pop(0)
                    running[job] = (self._start(job, start_from), time.monotonic())
                    watch(job, Outcome(status="running", reason=None, seconds=None))
                for job, (process, started) in list(running.items()):
                    if process.poll() is not None:
                        del running[job]
                        watch(job, self._finish(job, process.returncode, time.monotonic() - started))
                time.sleep(POLL_SECONDS)

    def _start(self, job: Job, start_from: Path | None) -> subprocess.Popen[bytes]:
        folder = self.path(job)
        record = self._record_of(job)
        if record is not None and record["identity"] != job.identity:
            _set_aside(folder)  # its checkpoints belong to another run
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with (folder / "screen.txt").open("wb") as screen:
            process = subprocess.Popen(
                self.command(job, start_from),
                stdout=screen,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # so that Ctrl-C reaches it once, from here
                preexec_fn=partial(_end_with, os.getpid()),
            )
        self._write(job, Outcome(status="running", reason=None, seconds=None), pid=process.pid)
        return process

    def _finish(self, job: Job, code: int, seconds: float) -> Outcome:
        done = code == 0
        outcome = Outcome(
            status="done" if done else "failed", reason=None if done else self._last_words(job, code), seconds=seconds
        )
        self._write(job, outcome, pid=None)
        if done:
            shutil.rmtree(self.path(job) / "checkpoints", ignore_errors=True)  # its export is what a study needs
        return outcome

    def _write(self, job: Job, outcome: Outcome, *, pid: int | None) -> None:
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

    def _refuse_a_living_one(self, job: Job) -> None:
        """A run of a study that was killed finishes its step first; two writers would spoil one folder."""
        record = self._record_of(job)
        pid = record and record["pid"]
        if pid and str(self.path(job)) in _command_line(pid):
            raise StudyError(
                f"{job.name} still runs, left by an earlier study, as process {pid}: try again when it has ended"
            )

    def _last_words(self, job: Job, code: int) -> str:
        lines = (self.path(job) / "screen.txt").read_text(encoding="utf-8", errors="replace").splitlines()
        said = [line.strip() for line in lines if line.strip()]
        stopped = [line for line in said if line.startswith("stopped:")]
        return f"exit status {code}: " + " | ".join(stopped[-1:] or said[-LAST_LINES:])


def assigned(key: str, path: Path) -> str:
    """The override key=path, quoted: a path may hold what Hydra's grammar gives a meaning to."""
    escaped = str(path).replace("\\", "\\\\").replace('"', '\\"')
    return f'{key}="{escaped}"'


def _end_with(parent: int) -> None:
    """Called in a new process, which gets SIGTERM when its parent ends in whatever way."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        os._exit(143)


def _set_aside(folder: Path) -> None:
    """Keeps what another run left under the same name."""
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
    """Leaves no run behind, whatever ends the study."""
    try:
        yield
    finally:
        if running:
            names = ", ".join(job.name for job in running)
            say(f"ending {names}: each finishes its step and saves it; Ctrl-C again ends them at once")
            end([process for process, _ in running.values()], SAVE_SECONDS)


def end(processes: Sequence[subprocess.Popen[bytes]], patience_s: float = STOP_SECONDS) -> None:
    """End processes that lead sessions of their own: SIGTERM, and again at an interrupt, then kill them with theirs."""
    for _ in range(2):
        for process in processes:
            process.terminate()
        try:
            return _wait(processes, patience_s)
        except KeyboardInterrupt:
            patience_s = STOP_SECONDS


def _wait(processes: Sequence[subprocess.Popen[bytes]], patience_s: float) -> None:
    until = time.monotonic() + patience_s
    for process in processes:
        try:
            process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
