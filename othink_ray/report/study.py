"""The page of a study: the paper's claims, tables and figures beside our numbers, and every run."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from othink_ray.report.rendering import date, duration, write_page
from othink_ray.report.study_figures import figures, seeds_note
from othink_ray.report.study_records import Study, read_study, value_of
from othink_ray.report.study_tables import (
    STATUSES,
    absolutes,
    judged_claims,
    measured,
    run_lines,
    table_1,
    transfers,
    verdict_counts,
)


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
