"""Shares of right answers over several seeds as one value with its interval, and the difference of two such values."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from othink_ray.core.intervals import mean_and_half, wilson
from othink_ray.study.plan import StudyRun


@dataclass(frozen=True, slots=True, kw_only=True)
class Value:
    """A mean over seeds; `lo` and `hi` bound it with 95 % confidence."""

    mean: float
    lo: float
    hi: float
    seeds: tuple[int, ...]
    values: tuple[float, ...]  # one a seed
    questions: int  # the same ones for every seed

    @property
    def of_questions(self) -> tuple[float, float]:
        """The interval for having asked these questions and no others; more seeds do not narrow it."""
        return wilson(self.mean * self.questions, self.questions)


def value(shares: Mapping[int, float], questions: int) -> Value | None:
    """Of the shares by seed. The interval covers both chances: which seeds were run, and which questions were asked."""
    if not shares:
        return None
    seeds = tuple(sorted(shares))
    values = tuple(shares[seed] for seed in seeds)
    mean, half = mean_and_half(values) if len(values) > 1 else (values[0], 0.0)
    lo, hi = wilson(mean * questions, questions)
    return Value(
        mean=mean,
        lo=max(0.0, min(lo, mean - half)),
        hi=min(1.0, max(hi, mean + half)),
        seeds=seeds,
        values=values,
        questions=questions,
    )


def difference(a: Value, b: Value) -> tuple[float, float, float]:
    """a - b with its 95 % interval: the wider, on each side, of that over paired seeds and that over the questions."""
    gap, (a_lo, a_hi), (b_lo, b_hi) = a.mean - b.mean, a.of_questions, b.of_questions
    # Newcombe's interval for the difference of two shares (1998, method 10).
    low, high = math.hypot(a.mean - a_lo, b_hi - b.mean), math.hypot(a_hi - a.mean, b.mean - b_lo)
    both = [
        (x, y)
        for seed, x in zip(a.seeds, a.values, strict=True)
        for other, y in zip(b.seeds, b.values, strict=True)
        if seed == other
    ]
    if len(both) > 1:
        _, half = mean_and_half([x - y for x, y in both])
        low, high = max(low, half), max(high, half)
    return gap, gap - low, gap + high


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
