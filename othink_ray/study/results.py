"""What the runs of a study measured, read from their folders."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from othink_ray.study.plan import StudyRun
from othink_ray.study.values import Single, Value, mean_and_half, value

Curve = list[tuple[int, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One finished run."""

    run: StudyRun
    summary: dict[str, Any]
    lines: Sequence[dict[str, Any]]

    def own(self, when: str, name: str = "accuracy") -> Single:
        """On the task it was trained on."""
        return _single(self.summary[when], name)

    def other(self, when: str) -> Single:
        """On the other task."""
        [result] = self.summary["also"].values()
        return _single(result[when], "accuracy")

    def curve(self, name: str) -> Curve:
        """Steps done -> the metric."""
        return [(line["step"] + 1, line[name]) for line in self.lines if line.get(name) is not None]


def read(folder: Path, run: StudyRun) -> Measured:
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return Measured(run=run, summary=summary, lines=lines)


def over_seeds(runs: Sequence[Measured], measure: Callable[[Measured], Single]) -> Value | None:
    return value([measure(run) for run in sorted(runs, key=lambda one: one.run.seed)])


def held_out_curve(runs: Sequence[Measured]) -> list[tuple[int, float, float, float]]:
    """(steps done, mean, low, high) at each evaluation that all the runs made; the interval is over seeds."""
    curves = [dict([(0, run.own("before").share), *run.curve("eval/accuracy")]) for run in runs]
    steps = sorted(set.intersection(*map(set, curves))) if curves else []
    points = []
    for step in steps:
        shares = [curve[step] for curve in curves]
        mean, half = mean_and_half(shares) if len(shares) > 1 else (shares[0], 0.0)
        points.append((step, mean, max(0.0, mean - half), min(1.0, mean + half)))
    return points


def mean_curve(runs: Sequence[Measured], name: str) -> Curve:
    """The mean of a metric over runs at each step that all of them logged."""
    curves = [dict(run.curve(name)) for run in runs]
    steps = sorted(set.intersection(*map(set, curves))) if curves else []
    return [(step, sum(curve[step] for curve in curves) / len(curves)) for step in steps]


def _single(evaluation: dict[str, float], name: str) -> Single:
    if name == "accuracy":
        return Single(share=evaluation["accuracy"], lo=evaluation["lo"], hi=evaluation["hi"])
    share, trials = evaluation[name], evaluation["n"]
    half = 1.96 * (max(share * (1 - share), 0.0) / trials) ** 0.5
    return Single(share=share, lo=max(0.0, share - half), hi=min(1.0, share + half))
