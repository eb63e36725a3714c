"""The run's page: what stands at its top, and the writing of the file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from othink_ray.report.axes import short
from othink_ray.report.cards import cards
from othink_ray.report.figures import column, figures
from othink_ray.report.records import RunFiles, is_finite, read_run
from othink_ray.report.rendering import date, duration, moment, write_page

MOST_DROPPED_ROWS = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Accuracy on held-out questions, in percent."""

    when: str
    accuracy: float
    lo: float
    hi: float


def write_report(run_dir: Path) -> Path:
    """Write report.html into the run's folder from what is in it, and return its path."""
    run = read_run(run_dir)
    started = column(run.rows, "time/unix_s")
    return write_page(
        run_dir,
        "page.html.j2",
        styles=("style.css.j2",),
        title=" · ".join(str(_named(run, key)) for key in ("algo", "model", "data")),
        date=date(started[0][1] if started else (run_dir / "config.yaml").stat().st_mtime),
        finished=bool(run.summary),
        progress=(run.rows[-1]["step"] if run.rows else 0, run.config.get("train", {}).get("steps")),
        results=_results(run),
        latest_accuracy=column(run.rows, "eval/accuracy")[-1:],
        facts=_facts(run),
        charts=figures(run),
        cards=cards(run.samples),
        table=_metrics_table(run.rows),
        dropped=run.summary.get("dropped") or [],
        incidents=[(moment(when), text) for when, text in run.incidents],
        most_dropped=MOST_DROPPED_ROWS,
        config_yaml=run.config_yaml,
        environment=run.environment,
        unreadable_lines=run.unreadable_lines,
    )


def _named(run: RunFiles, key: str) -> object:
    """The name of the run's model, data or algorithm."""
    return run.summary.get(key) or run.config.get(key, {}).get("name", f"unnamed {key}")


def _results(run: RunFiles) -> list[Result]:
    found = [(when, run.evaluation(when)) for when in ("before", "after")]
    return [
        Result(when=when, accuracy=100 * result["accuracy"], lo=100 * result["lo"], hi=100 * result["hi"])
        for when, result in found
        if result is not None
    ]


def _facts(run: RunFiles) -> list[tuple[str, str, str]]:
    """The small numbers at the top: (name, value, remark)."""
    summary = run.summary
    steps = summary.get("steps", run.rows[-1]["step"] if run.rows else 0)
    seconds = summary.get("seconds", sum(value for _, value in column(run.rows, "time/step_s")))
    facts = [("steps", f"{steps:,}", ""), ("duration", duration(seconds), "")]
    before, after = run.evaluation("before"), run.evaluation("after")
    if before is not None and after is not None:
        facts += [
            ("format", f"{100 * before['format']:.1f} → {100 * after['format']:.1f} %", ""),
            ("answer length", f"{before['tokens_mean']:.1f} → {after['tokens_mean']:.1f}", "tokens"),
            ("held-out questions", f"{after['n']:,.0f}", ""),
        ]
    throughput = [value for _, value in column(run.rows, "throughput/samples_per_s")]
    if throughput:
        facts.append(("throughput", short(fmean(throughput)), "answers/s"))
    gaps = [value for _, value in column(run.rows, "audit/logp_gap_max")]
    gap = summary.get("audit_gap_max", max(gaps, default=None))
    if is_finite(gap):
        facts.append(("largest audit gap", short(gap), "nats"))
    facts.append(("seed", str(summary.get("seed", run.config.get("train", {}).get("seed", "?"))), ""))
    return facts


def _metrics_table(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str, str, str]]:
    """Each metric's first, last, lowest and highest finite value."""
    names = sorted({name for row in rows for name in row if is_finite(row[name])} - {"step", "time/unix_s"})
    table = []
    for name in names:
        values = [value for _, value in column(rows, name)]
        table.append((name, short(values[0]), short(values[-1]), short(min(values)), short(max(values))))
    return table
