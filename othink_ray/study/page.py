"""Write the study's report: claims with verdicts, Table 1, figures, relative changes of Fig. 7, and runs."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from othink_ray.report.axes import linear_axis, tick_labels
from othink_ray.report.rendering import date, duration, write_page
from othink_ray.study.figures import figures, method_color, method_name, seeds_note
from othink_ray.study.records import RecordedValue, Row, StudyRecord, number, read_study, text, value_of

NOT_RUN = "no run done"
VERDICTS = {"held": "good", "did not hold": "bad", "not settled": "unsure", "not run": "none"}
STATUSES = {"done": "good", "failed": "bad", "running": "unsure", "waiting": "none"}
FOLDER_INSIDE_STUDY = re.compile(r"(?!.*(?:^|/)\.\.(?:/|$))[\w.-][\w./ -]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgedClaim:
    """Claim of the paper with the paper's and our numbers; `mood` is the CSS class of the verdict."""

    experiment: str
    claim: str
    paper: str
    ours: str
    verdict: str
    mood: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DisplayedValue:
    """RecordedValue formatted in percent; `left`, `width` and `dot` position it on a strip from 0 to 100 %."""

    mean: str
    interval: str
    by_seed: str
    left: float
    width: float
    dot: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Table1Row:
    """One method on one task of Table 1; `best_*` marks the highest value of the task in its column."""

    task: str
    first_of_task: bool
    method: str
    color: int
    ours: DisplayedValue | None
    paper: float | None
    paper_7b: float | None
    best_ours: bool
    best_paper: bool
    best_paper_7b: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class RelativeChange:
    """Relative change, ours as a bar (left, width) and the paper's as a mark, in percent of the strip."""

    label: str
    color: int
    ours: str
    paper: str
    bar: tuple[float, float] | None
    mark: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferPanel:
    """Relative changes of all methods from one task to another, on one scale."""

    title: str
    changes: Sequence[RelativeChange]
    ticks: Sequence[tuple[float, str]]
    zero: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferAccuracy:
    """Accuracies behind a relative change."""

    path: str
    method: str
    base: DisplayedValue | None
    ours: DisplayedValue | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRow:
    """Run in the list of runs; `link` is empty if the run has no report."""

    name: str
    status: str
    mood: str
    reason: str
    experiments: str
    seconds: str
    accuracy: str
    link: str
    command: str


def write_study_report(study_dir: Path) -> Path:
    """Write report.html from study.json in the study's folder and return its path."""
    study = read_study(study_dir)
    claims = judged_claims(study)
    return write_page(
        study_dir,
        "study.html.j2",
        styles=("style.css.j2", "study.css.j2"),
        package="othink_ray.study",
        study=study,
        written=date((study_dir / "study.json").stat().st_mtime),
        facts=_facts(study),
        claims=claims,
        verdicts=verdict_counts(claims),
        table1=table_1(study),
        table1_note=seeds_note(value_of(row.get("ours")) for row in study.table1),
        figures=figures(study),
        measured=display_value,
        transfers=transfers(study),
        absolutes=transfer_accuracies(study),
        fig7_note=seeds_note(value_of(row.get(key)) for row in study.fig7 for key in ("accuracy", "base")),
        runs=run_rows(study),
        statuses=_status_counts(study),
    )


def judged_claims(study: StudyRecord) -> list[JudgedClaim]:
    """Return the claims in the study's order."""
    return [
        JudgedClaim(
            experiment=text(row, "experiment", "–"),
            claim=text(row, "claim", "–"),
            paper=text(row, "paper", "–"),
            ours=text(row, "ours", NOT_RUN),
            verdict=(verdict := text(row, "verdict", "not run")),
            mood=VERDICTS.get(verdict, "none"),
        )
        for row in study.claims
    ]


def verdict_counts(claims: Sequence[JudgedClaim]) -> list[tuple[int, str, str]]:
    """Return (count, verdict, mood), known verdicts first."""
    counts = Counter(claim.verdict for claim in claims)
    return [
        (counts[verdict], verdict, VERDICTS.get(verdict, "none"))
        for verdict in {**VERDICTS, **counts}
        if counts[verdict]
    ]


def table_1(study: StudyRecord) -> list[Table1Row]:
    """Return the rows of Table 1, grouped by task."""
    tasks = list(dict.fromkeys(text(row, "task", "?") for row in study.table1))
    table = []
    for task in tasks:
        rows = [row for row in study.table1 if text(row, "task", "?") == task]
        ours = [value_of(row.get("ours")) for row in rows]
        paper = [number(row.get("paper")) for row in rows]
        paper_7b = [number(row.get("paper_7b")) for row in rows]
        best_ours = _best([None if value is None else value.mean for value in ours])
        best_paper, best_paper_7b = _best(paper), _best(paper_7b)
        table += [
            Table1Row(
                task=task_name(study, task),
                first_of_task=index == 0,
                method=method_name(text(row, "method", "?")),
                color=method_color(text(row, "method", "?")),
                ours=display_value(ours[index]),
                paper=paper[index],
                paper_7b=paper_7b[index],
                best_ours=index in best_ours,
                best_paper=index in best_paper,
                best_paper_7b=index in best_paper_7b,
            )
            for index, row in enumerate(rows)
        ]
    return table


def transfers(study: StudyRecord) -> list[TransferPanel]:
    """Return one panel per pair of tasks: every method relative to the base model, then to SFT."""
    pairs = dict.fromkeys((text(row, "train", "?"), text(row, "test", "?")) for row in study.fig7)
    return [panel for pair in pairs if (panel := _transfer(study, *pair)) is not None]


def transfer_accuracies(study: StudyRecord) -> list[TransferAccuracy]:
    """Return the accuracies behind Fig. 7."""
    return [
        TransferAccuracy(
            path=f"{text(row, 'train', '?')} → {text(row, 'test', '?')}",
            method=method_name(text(row, "method", "?")),
            base=display_value(value_of(row.get("base"))),
            ours=display_value(value_of(row.get("accuracy"))),
        )
        for row in study.fig7
    ]


def run_rows(study: StudyRecord) -> list[RunRow]:
    """Return the runs in the study's order."""
    return [
        RunRow(
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


def task_name(study: StudyRecord, task: str) -> str:
    """Return a task with its data set: VC (counting)."""
    return f"{task} ({study.tasks[task]})" if task in study.tasks else task


def display_value(value: RecordedValue | None) -> DisplayedValue | None:
    """Format a value in percent."""
    if value is None:
        return None
    return DisplayedValue(
        mean=f"{100 * value.mean:.1f}",
        interval=f"{100 * value.lo:.1f} – {100 * value.hi:.1f}",
        by_seed="by seed: " + ", ".join(f"{100 * seed_value:.1f}" for seed_value in value.by_seed)
        if value.by_seed
        else "",
        left=100 * value.lo,
        width=max(0.0, 100 * (value.hi - value.lo)),
        dot=min(max(100 * value.mean, 0.0), 100.0),
    )


def _transfer(study: StudyRecord, train: str, test: str) -> TransferPanel | None:
    rows = [row for row in study.fig7 if (text(row, "train", "?"), text(row, "test", "?")) == (train, test)]
    comparisons = [
        (f"{method_name(text(row, 'method', '?'))} over {other}", row, ours, paper)
        for key, other in (("over_base", "base"), ("over_sft", "SFT"))
        for row in rows
        for ours, paper in [_changes(row, key)]
        if ours is not None or paper is not None
    ]
    values = [value for _, _, ours, paper in comparisons for value in (ours, paper) if value is not None]
    if not values:
        return None
    axis = linear_axis(values, from_zero=True)
    zero = 100 * axis.position(0.0)
    changes = []
    for label, row, ours, paper in comparisons:
        end = zero if ours is None else 100 * axis.position(ours)
        changes.append(
            RelativeChange(
                label=label,
                color=method_color(text(row, "method", "?")),
                ours=_why_absent(row) if ours is None else f"{100 * ours:+,.1f} %",
                paper="" if paper is None else f"{100 * paper:+,.2f} %",
                bar=None if ours is None else (min(zero, end), abs(end - zero)),
                mark=None if paper is None else 100 * axis.position(paper),
            )
        )
    ticks = [
        (100 * axis.position(tick), label)
        for tick, label in zip(axis.ticks, tick_labels(axis, percent=True), strict=True)
    ]
    return TransferPanel(
        title=f"Trained on {task_name(study, train)}, tested on {task_name(study, test)}",
        changes=changes,
        ticks=ticks,
        zero=zero,
    )


def _why_absent(row: Row) -> str:
    """Return the reason for a missing relative change: no accuracy, or a baseline of 0."""
    return NOT_RUN if row.get("accuracy") is None else "baseline 0 %"


def _changes(row: Row, key: str) -> tuple[float | None, float | None]:
    """Return our relative change and the paper's as fractions; study.json has the paper's in percent."""
    paper = number(row.get(f"paper_{key}"))
    return number(row.get(key)), None if paper is None else paper / 100


def _best(values: Sequence[float | None]) -> set[int]:
    """Return the indices of the highest value; empty if a value is missing or there is only one."""
    known = [value for value in values if value is not None]
    complete = len(known) == len(values) > 1
    return {index for index, value in enumerate(known) if value == max(known)} if complete else set()


def _link(folder: str) -> str:
    """Return the URL of a run's report relative to the study's; empty for a folder outside the study."""
    return f"{quote(folder.rstrip('/'))}/report.html" if FOLDER_INSIDE_STUDY.fullmatch(folder) else ""


def _facts(study: StudyRecord) -> list[tuple[str, str]]:
    """Return (name, value) pairs for the header."""
    done = sum(run.status == "done" for run in study.runs)
    return [
        ("model", study.model or "–"),
        ("seeds", f"{len(study.seeds)} ({', '.join(map(str, study.seeds))})" if study.seeds else "–"),
        ("steps per run", _whole(study.steps)),
        ("test questions", _whole(study.questions)),
        ("runs done", f"{done} of {len(study.runs)}"),
        ("duration", "–" if study.seconds is None else duration(study.seconds)),
    ]


def _status_counts(study: StudyRecord) -> list[tuple[int, str, str]]:
    """Return (count, status, mood), known statuses first."""
    counts = Counter(run.status for run in study.runs)
    return [
        (counts[status], status, STATUSES.get(status, "none")) for status in {**STATUSES, **counts} if counts[status]
    ]


def _whole(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"
