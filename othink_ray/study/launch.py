"""Makes the runs of a study, several side by side, each as the command that a person would type."""

from __future__ import annotations

import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

LAST_LINES = 3  # of a failed run's output, as its reason
STOP_SECONDS = 60  # for an interrupted run to clean up
POLL_SECONDS = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One run of the list: its folder is `runs/<name>` in that of the study."""

    name: str
    overrides: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a job stands."""

    status: str  # waiting | running | done | failed
    reason: str | None
    seconds: float | None


class Workshop:
    """The study's folder with its runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, job: Job) -> Path:
        return self.folder / "runs" / job.name

    def command(self, job: Job) -> list[str]:
        """The run as a command; it goes on from its newest checkpoint where there is one."""
        own = [f"run.dir={self.path(job)}", "run.resume=auto"]
        return [sys.executable, "-m", "othink_ray.main", *job.overrides, *own]

    def shown_command(self, job: Job) -> str:
        return shlex.join(["python", *self.command(job)[1:]])

    def outcome(self, job: Job) -> Outcome:
        """What an earlier or the present study made of it; other overrides make it another run."""
        record = _read(self.path(job) / "outcome.json")
        if record is None or record.get("overrides") != list(job.overrides):
            return Outcome(status="waiting", reason=None, seconds=None)
        return Outcome(status=record["status"], reason=record["reason"], seconds=record["seconds"])

    def make(self, jobs: Sequence[Job], parallel: int, watch: Callable[[Job, Outcome], None]) -> None:
        """Runs those that are not done; a failed one does not stop the others, an interrupt stops all."""
        waiting = [job for job in jobs if self.outcome(job).status != "done"]
        running: dict[Job, tuple[subprocess.Popen[bytes], float]] = {}
        with _stopping(running):
            while waiting or running:
                while waiting and len(running) < parallel:
                    job = waiting.pop(0)
                    running[job] = (self._start(job), time.monotonic())
                    watch(job, Outcome(status="running", reason=None, seconds=None))
                for job, (process, started) in list(running.items()):
                    if process.poll() is not None:
                        del running[job]
                        outcome = self._finish(job, process.returncode, time.monotonic() - started)
                        watch(job, outcome)
                time.sleep(POLL_SECONDS)

    def _start(self, job: Job) -> subprocess.Popen[bytes]:
        folder = self.path(job)
        record = _read(folder / "outcome.json")
        if record is None or record.get("overrides") != list(job.overrides):
            shutil.rmtree(folder, ignore_errors=True)  # its checkpoints belong to another run
        folder.mkdir(parents=True, exist_ok=True)
        self._record(job, Outcome(status="running", reason=None, seconds=None))
        with (folder / "screen.txt").open("wb") as screen:
            # In a session of its own, so that Ctrl-C reaches it once, from here.
            return subprocess.Popen(
                self.command(job),
                stdout=screen,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def _finish(self, job: Job, code: int, seconds: float) -> Outcome:
        outcome = Outcome(
            status="done" if code == 0 else "failed",
            reason=None if code == 0 else self._last_words(job, code),
            seconds=seconds,
        )
        self._record(job, outcome)
        return outcome

    def _record(self, job: Job, outcome: Outcome) -> None:
        record = asdict(outcome) | {"overrides": list(job.overrides)}
        (self.path(job) / "outcome.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

    def _last_words(self, job: Job, code: int) -> str:
        lines = (self.path(job) / "screen.txt").read_text(encoding="utf-8", errors="replace").splitlines()
        said = [line.strip() for line in lines if line.strip()]
        stopped = [line for line in said if line.startswith("stopped:")]
        return f"exit status {code}: " + " | ".join(stopped[-1:] or said[-LAST_LINES:])


@contextmanager
def _stopping(running: dict[Job, tuple[subprocess.Popen[bytes], float]]) -> Iterator[None]:
    """Leaves no run behind, whatever ends the study."""
    try:
        yield
    finally:
        for process, _ in running.values():
            process.send_signal(signal.SIGINT)
        for process, _ in running.values():
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _read(file: Path) -> dict[str, Any] | None:
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None
