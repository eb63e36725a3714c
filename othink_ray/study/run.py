"""mode=study: execute the runs that are not done yet, and keep study.json and the report up to date."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from othink_ray.atomic_write import atomic_write
from othink_ray.config.load import to_yaml
from othink_ray.config.schema import Config
from othink_ray.study.claims import claims
from othink_ray.study.launch import WAITING, Job, JobOutcome, RunLauncher
from othink_ray.study.plan import GR, VC, StudyRun, base_overrides, compared_seeds, for_runs, planned
from othink_ray.study.results import FinishedRun, read_finished_run
from othink_ray.study.tables import Tables

BASE = "base"


class StudyConsole(Protocol):
    """Console interface that a study needs."""

    def say(self, text: str) -> None: ...

    def progress(self, done: int, total: int, text: str = "") -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedJob:
    """A planned run and the job that executes it."""

    run: StudyRun
    job: Job


class Study:
    """A study in its folder: its jobs, their launcher and study.json."""

    def __init__(self, config: Config, overrides: Sequence[str]) -> None:
        self.config, self.overrides = config, list(overrides)
        self.folder = Path(config.run.dir)
        self.launcher = RunLauncher(self.folder)
        extra = for_runs(overrides)
        self.base: Job | None = None
        if config.model.path is None:
            self.base = Job(name=BASE, overrides=base_overrides(config.study, extra), output_file="export/config.json")
        base_job_overrides = self.base.overrides if self.base else ()
        self.base_folder = self.launcher.path(self.base) if self.base else None
        self.planned_jobs = [
            PlannedJob(
                run=run,
                job=Job(
                    name=run.name,
                    overrides=run.overrides,
                    output_file="summary.json",
                    base_overrides=base_job_overrides,
                ),
            )
            for run in planned(config.study, extra)
        ]

    def run(self, console: StudyConsole, write_report: Callable[[Path], Path]) -> int:
        """Execute the study and return its exit status: 1 if a run failed, else 0."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        atomic_write(self.folder / "config.yaml", to_yaml(self.config))
        started = time.monotonic()
        earlier_seconds = _read_seconds(self.folder)

        def on_outcome(job: Job, outcome: JobOutcome) -> None:
            console.say(self._line(job, outcome))
            self._write(earlier_seconds + time.monotonic() - started)
            write_report(self.folder)
            console.progress(self._count("done"), self._total(), self._time_left())

        try:
            if self.base:
                self.launcher.run([self.base], 1, on_outcome, console.say)
            if self.base is None or self.launcher.outcome(self.base).status == "done":
                jobs = [planned_job.job for planned_job in self.planned_jobs]
                self.launcher.run(jobs, self.config.study.parallel, on_outcome, console.say, self.base_folder)
        finally:
            self._write(earlier_seconds + time.monotonic() - started, at_rest=True)
            console.say(f"report: {write_report(self.folder)}")
        failed = self._count("failed")
        if failed:
            console.say(f"{failed} run(s) failed: see the report for the reasons; run the same command to retry them")
        return 1 if failed else 0

    def _jobs(self) -> list[Job]:
        return [*([self.base] if self.base else []), *(planned_job.job for planned_job in self.planned_jobs)]

    def _total(self) -> int:
        return len(self._jobs())

    def _count(self, status: str) -> int:
        return sum(self.launcher.outcome(job).status == status for job in self._jobs())

    def _time_left(self) -> str:
        outcomes = [self.launcher.outcome(planned_job.job) for planned_job in self.planned_jobs]
        durations = [outcome.seconds for outcome in outcomes if outcome.status == "done" and outcome.seconds]
        if not durations:
            return ""
        left = sum(outcome.status in ("waiting", "running") for outcome in outcomes)
        minutes = left * sum(durations) / len(durations) / self.config.study.parallel / 60
        return f"about {minutes:.0f} min left"

    def _line(self, job: Job, outcome: JobOutcome) -> str:
        if outcome.status == "running":
            return f"{job.name}: started"
        took = f"{outcome.seconds or 0:.0f} s"
        if outcome.status == "failed":
            return f"{job.name}: failed after {took}: {outcome.reason}"
        summary = json.loads((self.launcher.path(job) / "summary.json").read_text(encoding="utf-8"))
        before, after = (100 * summary[when]["accuracy"] for when in ("before", "after"))
        return f"{job.name}: done in {took}, accuracy {before:.1f} -> {after:.1f} %"

    def _finished_runs(self) -> list[FinishedRun]:
        return [
            read_finished_run(self.launcher.path(planned_job.job), planned_job.run)
            for planned_job in self.planned_jobs
            if self.launcher.outcome(planned_job.job).status == "done"
        ]

    def _write(self, seconds: float, *, at_rest: bool = False) -> None:
        """Rewrite study.json; `at_rest` once no run is active."""
        study, finished_runs = self.config.study, self._finished_runs()
        tables = Tables(study, finished_runs)
        accuracy = {finished.run.name: finished.trained_task("after") for finished in finished_runs}
        steps = {finished.summary["steps"] for finished in finished_runs}
        record = {
            "name": study.name,
            "size": study.size,
            "finished": at_rest and self._count("done") == self._total(),
            "seconds": seconds,
            "command": shlex.join(["python", "-m", "othink_ray.main", *self.overrides]),
            "model": self.config.model.path or self.config.model.name,
            "seeds": list(compared_seeds(study)),
            "steps": max(steps, default=None),
            "questions": max((finished.summary["before"]["n"] for finished in finished_runs), default=None),
            "tasks": {VC: study.counting.data, GR: study.geometry.data},
            "runs": [self._record(job, accuracy.get(job.name), at_rest=at_rest) for job in self._jobs()],
            **tables.all(),
            "claims": claims(tables),
        }
        atomic_write(self.folder / "study.json", json.dumps(record, indent=2) + "\n")

    def _record(self, job: Job, accuracy: float | None, *, at_rest: bool) -> dict[str, Any]:
        outcome = self.launcher.outcome(job)
        if at_rest and outcome.status == "running":
            outcome = WAITING
        experiments = [
            experiment
            for planned_job in self.planned_jobs
            if planned_job.job == job
            for experiment in planned_job.run.experiments
        ]
        return {
            "name": job.name,
            "status": outcome.status,
            "reason": outcome.reason,
            "seconds": outcome.seconds,
            "folder": f"runs/{job.name}",
            "command": self.launcher.shown_command(job, None if job == self.base else self.base_folder),
            "experiments": experiments,
            "accuracy": accuracy,
            "has_report": (self.launcher.path(job) / "report.html").is_file(),
        }


def _read_seconds(folder: Path) -> float:
    """Return the seconds that earlier invocations of this study took."""
    try:
        return float(json.loads((folder / "study.json").read_text(encoding="utf-8"))["seconds"])
    except (OSError, ValueError, KeyError):
        return 0.0
