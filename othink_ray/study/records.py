"""Reading study.json, however much of the study has been run: what is null, missing or not finite is left out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from othink_ray.report.records import is_finite

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Value:
    """A fraction measured with one or more seeds; its interval lies in 0..1, `cut` when it had to be made to."""

    mean: float
    lo: float
    hi: float
    by_seed: Sequence[float]
    cut: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """(step, value) points, and (step, lo, hi) where there is an interval, `cut` when one did not lie in 0..1."""

    points: Sequence[tuple[int, float]]
    intervals: Sequence[tuple[int, float, float]]
    cut: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One training run of the study."""

    name: str
    status: str
    reason: str
    seconds: float | None
    folder: str
    command: str
    experiments: Sequence[str]
    accuracy: float | None
    has_report: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """The whole of study.json; `row` lists keep the file's keys and are read by the figure or table they are for."""

    name: str
    size: str
    finished: bool
    seconds: float | None
    command: str
    model: str
    seeds: Sequence[object]
    steps: float | None
    questions: float | None
    tasks: Mapping[str, str]
    runs: Sequence[Run]
    claims: Sequence[Row]
    table1: Sequence[Row]
    fig1: Sequence[Row]
    fig4: Sequence[Row]
    fig5: Sequence[Row]
    fig6: Sequence[Row]
    fig7: Sequence[Row]


def read_study(study_dir: Path) -> Study:
    """Read the study's only file; it has to be there and hold one JSON object."""
    path = study_dir / "study.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: a study report needs a study's folder, and this is none")
    try:
        record = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except ValueError as error:
        raise ValueError(
            f"{path} is not valid JSON ({error}): run the study again, it will write the file anew"
        ) from None
    if not isinstance(record, dict):
        raise ValueError(f"{path} holds a {type(record).__name__}, not an object: it is no record of a study")
    tasks = record.get("tasks")
    return Study(
        name=text(record, "name", "unnamed"),
        size=text(record, "size"),
        finished=record.get("finished") is True,
        seconds=number(record.get("seconds")),
        command=text(record, "command"),
        model=text(record, "model"),
        seeds=_items(record.get("seeds")),
        steps=number(record.get("steps")),
        questions=number(record.get("questions")),
        tasks={str(key): str(value) for key, value in tasks.items()} if isinstance(tasks, dict) else {},
        runs=[_run(row) for row in _rows(record, "runs")],
        **{key: _rows(record, key) for key in ("claims", "table1", "fig1", "fig4", "fig5", "fig6", "fig7")},
    )


def number(value: object) -> float | None:
    """A number that can be shown, or None."""
    return float(value) if isinstance(value, int | float) and is_finite(value) else None


def text(row: Row, key: str, otherwise: str = "") -> str:
    """A text of a row, or what stands for it when it is null, missing or empty."""
    value = row.get(key)
    return str(value) if value not in (None, "") else otherwise


def value_of(record: object) -> Value | None:
    """A measured value, or None when it has no mean; without an interval the mean is its own."""
    mean = number(record.get("mean")) if isinstance(record, dict) else None
    if mean is None or not isinstance(record, dict):
        return None
    lo, hi = _or(number(record.get("lo")), mean), _or(number(record.get("hi")), mean)
    by_seed = [value for item in _items(record.get("values")) if (value := number(item)) is not None]
    return Value(mean=mean, lo=_within(lo), hi=_within(hi), by_seed=by_seed, cut=lo < 0 or hi > 1)


def curve_of(points: object) -> Curve:
    """A curve from [step, value] or [step, mean, lo, hi] lists in order of steps; unusable points are left out."""
    found: dict[int, list[float | None]] = {}
    for point in _items(points):
        numbers = [number(item) for item in _items(point)]
        if len(numbers) >= 2 and numbers[0] is not None and numbers[1] is not None:
            found[round(numbers[0])] = numbers[1:]
    means = {step: mean for step in sorted(found) if (mean := found[step][0]) is not None}
    intervals = [
        (step, lo, hi)
        for step in means
        if len(found[step]) >= 3 and (lo := found[step][1]) is not None and (hi := found[step][2]) is not None
    ]
    return Curve(
        points=list(means.items()),
        intervals=[(step, _within(lo), _within(hi)) for step, lo, hi in intervals],
        cut=any(lo < 0 or hi > 1 for _, lo, hi in intervals),
    )


def _run(row: Row) -> Run:
    return Run(
        name=text(row, "name", "unnamed"),
        status=text(row, "status", "waiting"),
        reason=text(row, "reason"),
        seconds=number(row.get("seconds")),
        folder=text(row, "folder"),
        command=text(row, "command"),
        experiments=[str(item) for item in _items(row.get("experiments"))],
        accuracy=number(row.get("accuracy")),
        has_report=row.get("has_report") is True,
    )


def _rows(record: Row, key: str) -> list[Row]:
    return [item for item in _items(record.get(key)) if isinstance(item, dict)]


def _items(value: object) -> Sequence[object]:
    return value if isinstance(value, list) else []


def _or(value: float | None, otherwise: float) -> float:
    return otherwise if value is None else value


def _within(fraction: float) -> float:
    return min(max(fraction, 0.0), 1.0)
