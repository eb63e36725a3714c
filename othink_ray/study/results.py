"""Aggregate finished runs: accuracies over seeds as a mean with a 95 % interval, differences of means, and curves."""

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
class SeedMean:
    """Mean of a fraction over seeds; `lo` and `hi` are its 95 % confidence interval."""

    mean: float
    lo: float
    hi: float
    seeds: tuple[int, ...]
    values: tuple[float, ...]  # one per seed
    questions: int  # size of the eval set, the same for every seed

    @property
    def question_interval(self) -> tuple[float, float]:
        """95 % interval (lo, hi) for the choice of questions; more seeds do not narrow it."""
        return wilson(self.mean * self.questions, self.questions)


def seed_mean(fractions: Mapping[int, float], questions: int) -> SeedMean | None:
    """Aggregate {seed: fraction}. The interval covers both sources of variance: choice of seeds and of questions."""
    if not fractions:
        return None
    seeds = tuple(sorted(fractions))
    values = tuple(fractions[seed] for seed in seeds)
    mean, half = mean_and_half(values) if len(values) > 1 else (values[0], 0.0)
    lo, hi = wilson(mean * questions, questions)
    return SeedMean(
        mean=mean,
        lo=max(0.0, min(lo, mean - half)),
        hi=min(1.0, max(hi, mean + half)),
        seeds=seeds,
        values=values,
        questions=questions,
    )


def difference(a: SeedMean, b: SeedMean) -> tuple[float, float, float]:
    """Return (a - b, low, high) with a 95 % interval.

    Each side is that of the wider of two intervals: over paired seeds, and over the questions.
    """
    gap, (a_lo, a_hi), (b_lo, b_hi) = a.mean - b.mean, a.question_interval, b.question_interval
    # Newcombe's interval for the difference of two proportions (1998, method 10).
    low, high = math.hypot(a.mean - a_lo, b_hi - b.mean), math.hypot(a_hi - a.mean, b.mean - b_lo)
    pairs = [
        (x, y)
        for seed, x in zip(a.seeds, a.values, strict=True)
        for other, y in zip(b.seeds, b.values, strict=True)
        if seed == other
    ]
    if len(pairs) > 1:
        _, half = mean_and_half([x - y for x, y in pairs])
        low, high = max(low, half), max(high, half)
    return gap, gap - low, gap + high


Curve = list[tuple[int, float]]  # (steps done, value)


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedRun:
    """Summary and per-step metrics of a run that is done."""

    run: StudyRun
    summary: dict[str, Any]
    lines: Sequence[dict[str, Any]]

    @property
    def questions(self) -> int:
        """Size of the eval set."""
        return int(self.summary["before"]["n"])

    def trained_task(self, when: str, name: str = "accuracy") -> float:
        """Return a metric on the task that the run trained on, `before` or `after` training."""
        return float(self.summary[when][name])

    def other_task(self, when: str) -> float:
        """Return the accuracy on the other task, `before` or `after` training."""
        [result] = self.summary["also"].values()
        return float(result[when]["accuracy"])

    def curve(self, name: str) -> Curve:
        """Return (steps done, metric) for the steps that logged it."""
        return [(line["step"] + 1, line[name]) for line in self.lines if line.get(name) is not None]


def read_finished_run(folder: Path, run: StudyRun) -> FinishedRun:
    """Read summary.json and metrics.jsonl of a run."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return FinishedRun(run=run, summary=summary, lines=lines)


def over_seeds(runs: Sequence[FinishedRun], measure: Callable[[FinishedRun], float]) -> SeedMean | None:
    """Aggregate a measure over runs that differ only in their seed; None without a run."""
    questions = min((finished.questions for finished in runs), default=0)
    return seed_mean({finished.run.seed: measure(finished) for finished in runs}, questions)


def held_out_curve(runs: Sequence[FinishedRun]) -> list[tuple[int, float, float, float]]:
    """Return (steps done, mean, low, high) of the eval accuracy at each evaluation that all runs have."""
    curves = {
        finished.run.seed: dict([(0, finished.trained_task("before")), *finished.curve("eval/accuracy")])
        for finished in runs
    }
    steps = sorted(set.intersection(*map(set, curves.values()))) if curves else []
    points = []
    for step in steps:
        mean = seed_mean({seed: curve[step] for seed, curve in curves.items()}, runs[0].questions)
        assert mean is not None
        points.append((step, mean.mean, mean.lo, mean.hi))
    return points


def mean_curve(runs: Sequence[FinishedRun], name: str) -> Curve:
    """Return the mean of a metric over runs at each step that all of them logged."""
    curves = [dict(finished.curve(name)) for finished in runs]
    steps = sorted(set.intersection(*map(set, curves))) if curves else []
    return [(step, sum(curve[step] for curve in curves) / len(curves)) for step in steps]
