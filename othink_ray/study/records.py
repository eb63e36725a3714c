"""Read study.json at any stage of the study; null, missing and non-finite values are left out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from othink_ray.report.records import is_finite

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedValue:
    """Mean of a fraction over seeds with its interval, clipped to [0, 1]; `cut` if clipping changed it."""

    mean: float
    lo: float
    hi: float
    by_seed: Sequence[float]
    cut: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedCurve:
    """Points (step, value) and intervals (step, lo, hi) clipped to [0, 1]; `cut` if clipping changed one."""

    points: Sequence[tuple[int, float]]
    intervals: Sequence[tuple[int, float, float]]
    cut: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedRun:
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
class StudyRecord:
    """Contents of study.json; rows (`Row`) are parsed where they are read: by the claims, tables and figures."""

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
    runs: Sequence[RecordedRun]
    claims: Sequence[Row]
    table1: Sequence[Row]
    fig1: Sequence[Row]
    fig4: Sequence[Row]
    fig5: Sequence[Row]
    fig6: Sequence[Row]
    fig7: Sequence[Row]


def read_study(study_dir: Path) -> StudyRecord:
    """Read study.json; raise unless it exists and holds one JSON object."""
    path = study_dir / "study.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: pass the folder of a study (run.dir of mode=study)")
    try:
        record = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): run the study again to rewrite it") from None
    if not isinstance(record, dict):
        raise ValueError(
            f"{path} holds a {type(record).__name__}, not an object: run the study again to rewrite the file"
        )
    tasks = record.get("tasks")
    return StudyRecord(
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
    """Return a finite number as a float, else None."""
    return float(value) if isinstance(value, int | float) and is_finite(value) else None


def text(row: Row, key: str, otherwise: str = "") -> str:
    """Return a field of a row as text, or `otherwise` if it is null, missing or empty."""
    value = row.get(key)
    return str(value) if value not in (None, "") else otherwise


def value_of(record: object) -> RecordedValue | None:
    """Parse a value; None without a mean. A missing bound of the interval defaults to the mean."""
    mean = number(record.get("mean")) if isinstance(record, dict) else None
    if mean is None or not isinstance(record, dict):
        return None
    lo, hi = _default(number(record.get("lo")), mean), _default(number(record.get("hi")), mean)
    by_seed = [value for item in _items(record.get("values")) if (value := number(item)) is not None]
    return RecordedValue(mean=mean, lo=_clip(lo), hi=_clip(hi), by_seed=by_seed, cut=lo < 0 or hi > 1)


def curve_of(points: object) -> RecordedCurve:
    """Parse [step, value] or [step, mean, lo, hi] lists, sorted by step; malformed points are left out."""
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
    return RecordedCurve(
        points=list(means.items()),
        intervals=[(step, _clip(lo), _clip(hi)) for step, lo, hi in intervals],
        cut=any(lo < 0 or hi > 1 for _, lo, hi in intervals),
    )


def _run(row: Row) -> RecordedRun:
    return RecordedRun(
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


def _default(value: float | None, otherwise: float) -> float:
    return otherwise if value is None else value


def _clip(fraction: float) -> float:
    return min(max(fraction, 0.0), 1.0)
