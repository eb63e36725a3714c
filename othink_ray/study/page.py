"""The study's tables: claims with verdicts, Table 1, the relative changes of Fig. 7, and the runs."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from othink_ray.report.axes import linear_axis, tick_labels
from othink_ray.report.rendering import date, duration, write_page
from othink_ray.study.figures import figures, method_colour, method_name, seeds_note
from othink_ray.study.records import Row, Study, Value, number, read_study, text, value_of

NOT_RUN = "no run done"
VERDICTS = {"held": "good", "did not hold": "bad", "not settled": "unsure", "not run": "none"}
STATUSES = {"done": "good", "failed": "bad", "running": "unsure", "waiting": "none"}
INSIDE_THE_STUDY = re.compile(r"(?!.*(?:^|/)\.\.(?:/|$))[\w.-][\w./ -]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """A claim of the paper, both sides' numbers, and the verdict with its colour."""

    experiment: str
    claim: str
    paper: str
    ours: str
    verdict: str
    mood: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A value as text, and its place on a strip from 0 to 100 %."""

    mean: str
    interval: str
    by_seed: str
    left: float
    width: float
    dot: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One method on one task of Table 1; `best_*` marks the highest of the task in its column."""

    task: str
    first_of_task: bool
    method: str
    colour: int
    ours: Measured | None
    paper: float | None
    paper_7b: float | None
    best_ours: bool
    best_paper: bool
    best_paper_7b: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A relative change, ours as a bar and the paper's as a mark; places are in percent of the strip."""

    label: str
    colour: int
    ours: str
    paper: str
    bar: tuple[float, float] | None
    mark: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """All changes from one task to another on one scale."""

    title: str
    changes: Sequence[Change]
    ticks: Sequence[tuple[float, str]]
    zero: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Absolute:
    """The accuracies behind the changes."""

    path: str
    method: str
    base: Measured | None
    ours: Measured | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunLine:
    """A run as it is listed; `link` is empty without a page of its own."""

    name: str
    status: str
    mood: str
    reason: str
    experiments: str
    seconds: str
    accuracy: str
    link: str
    command: str


def judged_claims(study: Study) -> list[Judged]:
    """The claims in the study's order."""
    return [
        Judged(
            experiment=text(row, "experiment", "–"),
            claim=text(row, "claim", "–"),
            paper=text(row, "paper", "–"),
            ours=text(row, "ours", NOT_RUN),
            verdict=(verdict := text(row, "verdict", "not run")),
            mood=VERDICTS.get(verdict, "none"),
        )
        for row in study.claims
    ]


def verdict_counts(claims: Sequence[Judged]) -> list[tuple[int, str, str]]:
    """(how many, verdict, mood), the known verdicts first."""
    counts = Counter(claim.verdict for claim in claims)
    return [
        (counts[verdict], verdict, VERDICTS.get(verdict, "none"))
        for verdict in {**VERDICTS, **counts}
        if counts[verdict]
    ]


def table_1(study: Study) -> list[Cell]:
    """The rows of Table 1, those of a task together."""
    tasks = list(dict.fromkeys(text(row, "task", "?") for row in study.table1))
    cells = []
    for task in tasks:
        rows = [row for row in study.table1 if text(row, "task", "?") == task]
        ours = [value_of(row.get("ours")) for row in rows]
        paper = [number(row.get("paper")) for row in rows]
        paper_7b = [number(row.get("paper_7b")) for row in rows]
        best_ours = _best([None if value is None else value.mean for value in ours])
        best_paper, best_paper_7b = _best(paper), _best(paper_7b)
        cells += [
            Cell(
                task=task_name(study, task),
                first_of_task=place == 0,
                method=method_name(text(row, "method", "?")),
                colour=method_colour(text(row, "method", "?")),
                ours=measured(ours[place]),
                paper=paper[place],
                paper_7b=paper_7b[place],
                best_ours=place in best_ours,
                best_paper=place in best_paper,
                best_paper_7b=place in best_paper_7b,
            )
            for place, row in enumerate(rows)
        ]
    return cells


def transfers(study: Study) -> list[Transfer]:
    """One panel for each pair of tasks: every method over the base model, then over SFT."""
    pairs = dict.fromkeys((text(row, "train", "?"), text(row, "test", "?")) for row in study.fig7)
    return [panel for pair in pairs if (panel := _transfer(study, *pair)) is not None]


def absolutes(study: Study) -> list[Absolute]:
    """The accuracies behind Fig. 7."""
    return [
        Absolute(
            path=f"{text(row, 'train', '?')} → {text(row, 'test', '?')}",
            method=method_name(text(row, "method", "?")),
            base=measured(value_of(row.get("base"))),
            ours=measured(value_of(row.get("accuracy"))),
        )
        for row in study.fig7
    ]


def run_lines(study: Study) -> list[RunLine]:
    """The runs in the study's order."""
    return [
        RunLine(
            name=run.name,
            status=run.status,
            mood=STATUSES.get(run.status, "none"),
            reason=run.reason or ("no reason recorded" if run.status == "failed" else ""),
            experiments=", ".join(run.experiments),
            seconds="" if run.seconds is None else duration(run.seconds),
            accuracy="" if run.accuracy is None else f"{100 * run.accuracy:.1f} %",
            link=_link(run.folder) if run.has_report else "",
            command=run.command,
        )
        for run in study.runs
    ]


def task_name(study: Study, task: str) -> str:
    """VC (counting)."""
    return f"{task} ({study.tasks[task]})" if task in study.tasks else task


def measured(value: Value | None) -> Measured | None:
    """A value ready to be shown in percent."""
    if value is None:
        return None
    return Measured(
        mean=f"{100 * value.mean:.1f}",
        interval=f"{100 * value.lo:.1f} – {100 * value.hi:.1f}",
        by_seed="by seed: " + ", ".join(f"{100 * one:.1f}" for one in value.by_seed) if value.by_seed else "",
        left=100 * value.lo,
        width=max(0.0, 100 * (value.hi - value.lo)),
        dot=min(max(100 * value.mean, 0.0), 100.0),
    )


def _transfer(study: Study, train: str, test: str) -> Transfer | None:
    rows = [row for row in study.fig7 if (text(row, "train", "?"), text(row, "test", "?")) == (train, test)]
    found = [
        (f"{method_name(text(row, 'method', '?'))} over {other}", row, ours, paper)
        for key, other in (("over_base", "base"), ("over_sft", "SFT"))
        for row in rows
        for ours, paper in [_both(row, key)]
        if ours is not None or paper is not None
    ]
    values = [value for _, _, ours, paper in found for value in (ours, paper) if value is not None]
    if not values:
        return None
    axis = linear_axis(values, from_zero=True)
    zero = 100 * axis.place(0.0)
    changes = []
    for label, row, ours, paper in found:
        end = zero if ours is None else 100 * axis.place(ours)
        changes.append(
            Change(
                label=label,
                colour=method_colour(text(row, "method", "?")),
                ours=_absent(row) if ours is None else f"{100 * ours:+,.1f} %",
                paper="" if paper is None else f"{100 * paper:+,.2f} %",
                bar=None if ours is None else (min(zero, end), abs(end - zero)),
                mark=None if paper is None else 100 * axis.place(paper),
            )
        )
    ticks = [
        (100 * axis.place(tick), label) for tick, label in zip(axis.ticks, tick_labels(axis, percent=True), strict=True)
    ]
    return Transfer(
        title=f"Trained on {task_name(study, train)}, tested on {task_name(study, test)}",
        changes=changes,
        ticks=ticks,
        zero=zero,
    )


def _absent(row: Row) -> str:
    """Why there is no relative change: nothing was measured, or what it would be relative to is 0."""
    return NOT_RUN if row.get("accuracy") is None else "from 0 %"


def _both(row: Row, key: str) -> tuple[float | None, float | None]:
    """Our relative change and the paper's, which is in percent there, as fractions."""
    paper = number(row.get(f"paper_{key}"))
    return number(row.get(key)), None if paper is None else paper / 100


def _best(values: Sequence[float | None]) -> set[int]:
    """The places of the highest value; none before all that it is compared with are known."""
    known = [value for value in values if value is not None]
    complete = len(known) == len(values) > 1
    return {place for place, value in enumerate(known) if value == max(known)} if complete else set()


def _link(folder: str) -> str:
    """The address of a run's page relative to the study's; empty for a folder that lies outside of it."""
    return f"{quote(folder.rstrip('/'))}/report.html" if INSIDE_THE_STUDY.fullmatch(folder) else ""


def write_study_report(study_dir: Path) -> Path:
    """Write report.html into the study's folder from its study.json, and return its path."""
    study = read_study(study_dir)
    claims = judged_claims(study)
    return write_page(
        study_dir,
        "study.html.j2",
        styles=("style.css.j2", "study.css.j2"),
        study=study,
        written=date((study_dir / "study.json").stat().st_mtime),
        facts=_facts(study),
        claims=claims,
        verdicts=verdict_counts(claims),
        table1=table_1(study),
        table1_note=seeds_note(value_of(row.get("ours")) for row in study.table1),
        figures=figures(study),
        measured=measured,
        transfers=transfers(study),
        absolutes=absolutes(study),
        fig7_note=seeds_note(value_of(row.get(key)) for row in study.fig7 for key in ("accuracy", "base")),
        runs=run_lines(study),
        statuses=_status_counts(study),
    )


def _facts(study: Study) -> list[tuple[str, str]]:
    """The small numbers at the top."""
    done = sum(run.status == "done" for run in study.runs)
    return [
        ("model", study.model or "–"),
        ("seeds", f"{len(study.seeds)} ({', '.join(map(str, study.seeds))})" if study.seeds else "–"),
        ("steps a run", _whole(study.steps)),
        ("test questions", _whole(study.questions)),
        ("runs done", f"{done} of {len(study.runs)}"),
        ("duration", "–" if study.seconds is None else duration(study.seconds)),
    ]


def _status_counts(study: Study) -> list[tuple[int, str, str]]:
    """(how many, status, mood), the known ones first."""
    counts = Counter(run.status for run in study.runs)
    return [
        (counts[status], status, STATUSES.get(status, "none")) for status in {**STATUSES, **counts} if counts[status]
    ]


def _whole(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"
