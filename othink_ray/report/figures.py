"""The charts of a run's page, in order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from othink_ray.report.charts import Chart, Point, Scale, Series, area_chart, line_chart
from othink_ray.report.records import RunFiles, is_finite

BLUE, ORANGE, GREEN, VIOLET, GRAY = 1, 2, 3, 4, 5
STEP_PHASES = (("generate", BLUE), ("score", GREEN), ("update", ORANGE), ("push", VIOLET))
FRACTION = Scale(percent=True)
PLAIN = Scale()
FREE = Scale(from_zero=False)
ALSO_PREFIX = "eval/accuracy/"


def figures(run: RunFiles) -> list[Chart]:
    """Return all charts that have at least one value."""
    rows = run.rows

    def curve(label: str, name: str, color: int, **settings: Any) -> Series:
        return Series(label=label, color=color, points=column(rows, name), **settings)

    tolerances = column(rows, "audit/tolerance")
    steps = (rows[0]["step"], rows[-1]["step"]) if rows else (0, 0)
    chart = partial(line_chart, steps=steps)
    charts = [
        chart(
            "Reward in training",
            [
                curve("reward", "reward/mean", BLUE, smooth=True),
                curve("accuracy", "reward/accuracy", ORANGE, smooth=True),
                curve("format", "reward/format", GREEN, smooth=True),
            ],
            left=PLAIN,
        ),
        *supervised(run, curve, chart),
        chart(
            "Held-out accuracy",
            [held_out(run), *other_tasks(run)],
            left=Scale(percent=True, from_zero=False, least_span=0.2),
        ),
        chart(
            "KL weight and KL",
            [curve("β(s)", "kl/beta", BLUE), curve("KL", "kl/mean", ORANGE, side="right", smooth=True)],
            left=PLAIN,
            right=PLAIN,
        ),
        chart(
            "Policy ratio and clipping",
            [
                curve("mean ratio", "ratio/raw_mean", BLUE, smooth=True),
                curve("largest ratio", "ratio/raw_max", VIOLET, reduce=max, smooth=True),
                curve("clipped", "ratio/clip_frac", ORANGE, side="right", smooth=True),
            ],
            left=Scale(from_zero=False, least_span=0.2),
            right=FRACTION,
        ),
        chart(
            "Entropy and answer length",
            [
                curve("entropy, nats", "entropy", BLUE, smooth=True),
                curve("tokens per answer", "tokens/completion_mean", ORANGE, side="right", smooth=True),
            ],
            left=PLAIN,
            right=FREE,
        ),
        chart(
            "Audit gap: engines against learner, nats",
            [
                curve("largest", "audit/logp_gap_max", VIOLET, reduce=max, smooth=True),
                curve("mean", "audit/logp_gap_mean", BLUE, smooth=True),
            ],
            left=Scale(log=True),
            reference=("tolerance of the mean", tolerances[-1][1]) if tolerances else None,
        ),
        area_chart("Seconds per step", time_split(rows), scale=PLAIN),
        chart("Throughput", [curve("answers/s", "throughput/samples_per_s", BLUE, smooth=True)], left=PLAIN),
        chart(
            "Groups whose answers all score the same",
            [curve("no signal", "groups/constant_frac", BLUE, smooth=True)],
            left=FRACTION,
        ),
    ]
    return [drawn for drawn in charts if drawn is not None]


def supervised(run: RunFiles, curve: Callable[..., Series], chart: Callable[..., Chart | None]) -> list[Chart | None]:
    """Return the loss chart of a supervised run, which logs no rewards."""
    if column(run.rows, "reward/mean"):
        return []
    loss, rate = curve("loss, nats", "loss", BLUE, smooth=True), curve("learning rate", "lr", ORANGE, side="right")
    return [chart("Loss", [loss, rate], left=PLAIN, right=PLAIN)]


def other_tasks(run: RunFiles) -> list[Series]:
    """Return accuracy curves on the data sets of eval.also; the value before training is only in the summary."""
    series = []
    colors = (ORANGE, GREEN, VIOLET)
    names = sorted({name.removeprefix(ALSO_PREFIX) for row in run.rows for name in row if name.startswith(ALSO_PREFIX)})
    for name, color in zip(names, colors, strict=False):
        points = dict(column(run.rows, ALSO_PREFIX + name))
        before = (run.summary.get("also") or {}).get(name, {}).get("before", {}).get("accuracy")
        if is_finite(before):
            points.setdefault(0, before)
        series.append(Series(label=name, color=color, points=sorted(points.items()), dots=True))
    return series


def column(rows: Sequence[Mapping[str, Any]], name: str) -> list[Point]:
    """Return the finite values of one metric as (step, value)."""
    return [(row["step"], float(row[name])) for row in rows if is_finite(row.get(name))]


def held_out(run: RunFiles) -> Series:
    """Return accuracy at every evaluation, with 95 % intervals before and after training."""
    points = dict(column(run.rows, "eval/accuracy"))
    last_step = run.rows[-1]["step"] if run.rows else 0
    intervals = []
    for step, when in ((0, "before"), (last_step, "after")):
        result = run.evaluation(when)
        if result is not None:
            points[step] = result["accuracy"]
            intervals.append((step, result["lo"], result["hi"]))
    return Series(label="accuracy, greedy", color=BLUE, points=sorted(points.items()), dots=True, intervals=intervals)


def time_split(rows: Sequence[Mapping[str, Any]]) -> list[Series]:
    """Return the seconds of each phase of a step and, if the whole step takes longer than their sum, the remainder."""
    timed = [row for row in rows if any(is_finite(row.get(f"time/{phase}_s")) for phase, _ in STEP_PHASES)]

    def seconds(row: Mapping[str, Any], name: str) -> float:
        value = row.get(f"time/{name}_s")
        return float(value) if value is not None and is_finite(value) else 0.0

    series = [
        Series(label=phase, color=color, points=[(row["step"], seconds(row, phase)) for row in timed])
        for phase, color in STEP_PHASES
    ]
    rest = [
        (row["step"], max(0.0, seconds(row, "step") - sum(seconds(row, phase) for phase, _ in STEP_PHASES)))
        for row in timed
    ]
    if any(value > 0 for _, value in rest):
        series.append(Series(label="other", color=GRAY, points=rest))
    return series
