"""A run's report.html: headline accuracy, facts, charts, sampled groups as cards, metrics, incidents and settings."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from othink_ray.report.axes import short
from othink_ray.report.figures import column, figures
from othink_ray.report.records import RunFiles, is_finite, read_run
from othink_ray.report.rendering import date, duration, moment, write_page

TAG = re.compile(r"(</?(?:think|answer)>)")
PICTURE = re.compile(r"data:image/(?:png|jpeg);base64,[A-Za-z0-9+/=]+")
MOST_DROPPED_ROWS = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Accuracy on held-out questions and its 95 % interval, in percent."""

    when: str
    accuracy: float
    lo: float
    hi: float


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerCard:
    """One sampled answer; its advantage bar extends from the middle (`bar_left` and `bar_width` are in percent)."""

    pieces: Sequence[tuple[bool, str]]  # (is a tag, text)
    reward: float
    parts: Sequence[tuple[str, float]]
    advantage: float
    bar_left: float
    bar_width: float
    valid: bool
    cut: bool
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """One question with its group of answers."""

    when: str
    step: int
    prompt_id: str
    question: str
    truth: str
    images: Sequence[str]
    version: int
    answers: Sequence[AnswerCard]


def write_report(run_dir: Path) -> Path:
    """Write report.html into the run's folder from the files in it, and return its path."""
    run = read_run(run_dir)
    started = column(run.rows, "time/unix_s")
    return write_page(
        run_dir,
        "page.html.j2",
        styles=("style.css.j2",),
        title=" · ".join(str(_group_name(run, group)) for group in ("algo", "model", "data")),
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


def cards(samples: Sequence[Mapping[str, Any]]) -> list[Card]:
    """Return one card each for the first, middle and last sampled step, to compare early and late answers."""
    steps = sorted({sample["step"] for sample in samples})
    if not steps:
        return []
    chosen = sorted({steps[0], steps[len(steps) // 2], steps[-1]})
    names = {1: ["only"], 2: ["early", "late"], 3: ["early", "midway", "late"]}[len(chosen)]
    return [
        _card(when, _most_informative([sample for sample in samples if sample["step"] == step]))
        for when, step in zip(names, chosen, strict=True)
    ]


def pieces_of(text: str) -> list[tuple[bool, str]]:
    """Split an answer at its tags: (is a tag, text)."""
    return [(bool(TAG.fullmatch(piece)), piece) for piece in TAG.split(text) if piece]


def _group_name(run: RunFiles, group: str) -> object:
    """Return the name of the run's model, data or algorithm."""
    return run.summary.get(group) or run.config.get(group, {}).get("name", f"unnamed {group}")


def _results(run: RunFiles) -> list[Result]:
    evaluations = [(when, run.evaluation(when)) for when in ("before", "after")]
    return [
        Result(when=when, accuracy=100 * result["accuracy"], lo=100 * result["lo"], hi=100 * result["hi"])
        for when, result in evaluations
        if result is not None
    ]


def _facts(run: RunFiles) -> list[tuple[str, str, str]]:
    """Return the small numbers at the top of the page: (name, value, unit)."""
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
    """Return each metric's name and its first, last, lowest and highest finite value."""
    names = sorted({name for row in rows for name in row if is_finite(row[name])} - {"step", "time/unix_s"})
    table = []
    for name in names:
        values = [value for _, value in column(rows, name)]
        table.append((name, short(values[0]), short(values[-1]), short(min(values)), short(max(values))))
    return table


def _most_informative(samples: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Return the first group whose rewards differ, or the first group if none do."""
    mixed = [sample for sample in samples if len({answer["reward"] for answer in sample["completions"]}) > 1]
    return (mixed or samples)[0]


def _card(when: str, sample: Mapping[str, Any]) -> Card:
    largest = max((abs(answer["advantage"] or 0.0) for answer in sample["completions"]), default=0.0)
    return Card(
        when=when,
        step=sample["step"],
        prompt_id=sample["prompt_id"],
        question=sample["question"],
        truth=sample["answer"],
        images=[image for image in sample["images"] if PICTURE.fullmatch(image)],
        version=sample["version"],
        answers=[_answer_card(answer, largest) for answer in sample["completions"]],
    )


def _answer_card(answer: Mapping[str, Any], largest_advantage: float) -> AnswerCard:
    advantage = _number(answer["advantage"])
    width = 50 * abs(advantage) / largest_advantage if advantage and is_finite(advantage) else 0.0
    return AnswerCard(
        pieces=pieces_of(answer["text"]),
        reward=_number(answer["reward"]),
        parts=[(name, _number(value)) for name, value in answer["parts"].items()],
        advantage=advantage,
        bar_left=50 - width if advantage < 0 else 50,
        bar_width=width,
        valid=answer["valid"],
        cut=answer["finish"] == "length",
        tokens=answer["tokens"],
    )


def _number(value: float | None) -> float:
    """Return a recorded value as a float; null stands for a value that was not finite."""
    return float("nan") if value is None else float(value)
