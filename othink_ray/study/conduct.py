"""mode=study: makes the runs that are not done yet, and keeps study.json and its page up to date."""

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
from othink_ray.study.launch import NOT_YET, Job, Outcome, Workshop
from othink_ray.study.plan import GR, VC, StudyRun, base_overrides, compared_seeds, for_runs, planned
from othink_ray.study.results import FinishedRun, read
from othink_ray.study.tables import Tables

BASE = "base"


class Screen(Protocol):
    """The console of a study."""

    def say(self, text: str) -> None: ...

    def progress(self, done: int, total: int, text: str = "") -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A run with the job that makes it."""

    run: StudyRun
    job: Job


class Study:
    """A study in its folder."""

    def __init__(self, config: Config, overrides: Sequence[str]) -> None:
        self.config, self.overrides = config, list(overrides)
        self.folder = Path(config.run.dir)
        self.workshop = Workshop(self.folder)
        extra = for_runs(overrides)
        self.base: Job | None = None
        if config.model.path is None:
            self.base = Job(name=BASE, overrides=base_overrides(config.study, extra), leaves="export/config.json")
        stands_on = self.base.overrides if self.base else ()
        self.start_from = self.workshop.path(self.base) if self.base else None
        self.entries = [
            Entry(
                run=run,
                job=Job(name=run.name, overrides=run.overrides, leaves="summary.json", stands_on=stands_on),
            )
            for run in planned(config.study, extra)
        ]

    def conduct(self, screen: Screen, write_report: Callable[[Path], Path]) -> int:
        """Its exit status: 0 when every run is done."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        atomic_write(self.folder / "config.yaml", to_yaml(self.config))
        started = time.monotonic()
        before = _read_seconds(self.folder)

        def seen(job: Job, outcome: Outcome) -> None:
            screen.say(self._line(job, outcome))
            self._write(before + time.monotonic() - started)
            write_report(self.folder)
            screen.progress(self._count("done"), self._total(), self._time_left())

        try:
            if self.base:
                self.workshop.make([self.base], 1, seen, screen.say)
            if self.base is None or self.workshop.outcome(self.base).status == "done":
                jobs = [entry.job for entry in self.entries]
                self.workshop.make(jobs, self.config.study.parallel, seen, screen.say, self.start_from)
        finally:
            self._write(before + time.monotonic() - started, at_rest=True)
            screen.say(f"report: {write_report(self.folder)}")
        failed = self._count("failed")
        if failed:
            screen.say(f"{failed} run(s) failed: the report says why; the same command tries them again")
        return 1 if failed else 0

    def _jobs(self) -> list[Job]:
        return [*([self.base] if self.base else []), *(entry.job for entry in self.entries)]

    def _total(self) -> int:
        return len(self._jobs())

    def _count(self, status: str) -> int:
        return sum(self.workshop.outcome(job).status == status for job in self._jobs())

    def _time_left(self) -> str:
        outcomes = [self.workshop.outcome(entry.job) for entry in self.entries]
        spent = [one.seconds for one in outcomes if one.status == "done" and one.seconds]
        if not spent:
            return ""
        left = sum(one.status in ("waiting", "running") for one in outcomes)
        minutes = left * sum(spent) / len(spent) / self.config.study.parallel / 60
        return f"about {minutes:.0f} min left"

    def _line(self, job: Job, outcome: Outcome) -> str:
        if outcome.status == "running":
            return f"{job.name}: started"
        took = f"{outcome.seconds or 0:.0f} s"
        if outcome.status == "failed":
            return f"{job.name}: failed after {took}: {outcome.reason}"
        summary = json.loads((self.workshop.path(job) / "summary.json").read_text(encoding="utf-8"))
        before, after = (100 * summary[when]["accuracy"] for when in ("before", "after"))
        return f"{job.name}: done in {took}, accuracy {before:.1f} -> {after:.1f} %"

    def _measured(self) -> list[FinishedRun]:
        return [
            read(self.workshop.path(entry.job), entry.run)
            for entry in self.entries
            if self.workshop.outcome(entry.job).status == "done"
        ]

    def _write(self, seconds: float, *, at_rest: bool = False) -> None:
        """study.json, whole; `at_rest`: nothing runs any more."""
        study, measured = self.config.study, self._measured()
        tables = Tables(study, measured)
        accuracy = {one.run.name: one.own("after") for one in measured}
        steps = {one.summary["steps"] for one in measured}
        whole = {
            "name": study.name,
            "size": study.size,
            "finished": at_rest and self._count("done") == self._total(),
            "seconds": seconds,
            "command": shlex.join(["python", "-m", "othink_ray.main", *self.overrides]),
            "model": self.config.model.path or self.config.model.name,
            "seeds": list(compared_seeds(study)),
            "steps": max(steps, default=None),
            "questions": max((one.summary["before"]["n"] for one in measured), default=None),
            "tasks": {VC: study.counting.data, GR: study.geometry.data},
            "runs": [self._record(job, accuracy.get(job.name), at_rest=at_rest) for job in self._jobs()],
            **tables.all(),
            "claims": claims(tables),
        }
        atomic_write(self.folder / "study.json", json.dumps(whole, indent=2) + "\n")

    def _record(self, job: Job, accuracy: float | None, *, at_rest: bool) -> dict[str, Any]:
        outcome = self.workshop.outcome(job)
        if at_rest and outcome.status == "running":
            outcome = NOT_YET
        experiments = [one for entry in self.entries if entry.job == job for one in entry.run.experiments]
        return {
            "name": job.name,
            "status": outcome.status,
            "reason": outcome.reason,
            "seconds": outcome.seconds,
            "folder": f"runs/{job.name}",
            "command": self.workshop.shown_command(job, None if job == self.base else self.start_from),
            "experiments": experiments,
            "accuracy": accuracy,
            "has_report": (self.workshop.path(job) / "report.html").is_file(),
        }


def _read_seconds(folder: Path) -> float:
    """Seconds that earlier commands of this study took."""
    try:
        return float(json.loads((folder / "study.json").read_text(encoding="utf-8"))["seconds"])
    except (OSError, ValueError, KeyError):
        return 0.0
