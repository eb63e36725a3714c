"""What the runs of a study measured, read from their folders."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from othink_ray.study.plan import StudyRun
from othink_ray.study.values import Value, value

Curve = list[tuple[int, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedRun:
    """One run with its summary and its metrics, a line a step."""

    run: StudyRun
    summary: dict[str, Any]
    lines: Sequence[dict[str, Any]]

    @property
    def questions(self) -> int:
        return int(self.summary["before"]["n"])

    def own(self, when: str, name: str = "accuracy") -> float:
        """On the task that it was trained on."""
        return float(self.summary[when][name])

    def other(self, when: str) -> float:
        """Accuracy on the other task."""
        [result] = self.summary["also"].values()
        return float(result[when]["accuracy"])

    def curve(self, name: str) -> Curve:
        """Steps done -> the metric."""
        return [(line["step"] + 1, line[name]) for line in self.lines if line.get(name) is not None]


def read(folder: Path, run: StudyRun) -> FinishedRun:
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return FinishedRun(run=run, summary=summary, lines=lines)


def over_seeds(runs: Sequence[FinishedRun], measure: Callable[[FinishedRun], float]) -> Value | None:
    questions = min((one.questions for one in runs), default=0)
    return value({one.run.seed: measure(one) for one in runs}, questions)


def held_out_curve(runs: Sequence[FinishedRun]) -> list[tuple[int, float, float, float]]:
    """(steps done, mean, low, high) at each evaluation that all the runs made."""
    curves = {run.run.seed: dict([(0, run.own("before")), *run.curve("eval/accuracy")]) for run in runs}
    steps = sorted(set.intersection(*map(set, curves.values()))) if curves else []
    points = []
    for step in steps:
        found = value({seed: curve[step] for seed, curve in curves.items()}, runs[0].questions)
        assert found is not None
        points.append((step, found.mean, found.lo, found.hi))
    return points


def mean_curve(runs: Sequence[FinishedRun], name: str) -> Curve:
    """The mean of a metric over runs at each step that all of them logged."""
    curves = [dict(run.curve(name)) for run in runs]
    steps = sorted(set.intersection(*map(set, curves))) if curves else []
    return [(step, sum(curve[step] for curve in curves) / len(curves)) for step in steps]
