"""The page of an evaluation: the matrix of models and tasks, and sample questions with their answers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from othink_ray.report.page import PICTURE, pieces_of
from othink_ray.report.records import read_environment
from othink_ray.report.rendering import date, duration, write_page

CARDS = 6  # per model and data set, wrong answers first


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One question, its greedy answer, and how many of its sampled answers are right."""

    id: str
    question: str
    truth: str
    images: Sequence[str]
    pieces: Sequence[tuple[bool, str]]  # (is a tag, text)
    right: bool
    well_formed: bool
    sampled_right: int
    sampled: int


def write_evaluation_report(run_dir: Path) -> Path:
    """Write report.html from evaluation.json and the answer files beside it, and return its path."""
    file = run_dir / "evaluation.json"
    evaluation = json.loads(file.read_text(encoding="utf-8"))
    results = evaluation["results"]
    return write_page(
        run_dir,
        "evaluation.html.j2",
        styles=("style.css.j2",),
        date=date(file.stat().st_mtime),
        took=duration(evaluation["seconds"]),
        engine=evaluation["engine"],
        models=list(dict.fromkeys(result["model"] for result in results)),
        tasks=list(dict.fromkeys(result["data"] for result in results)),
        cells={(result["model"], result["data"]): result for result in results},
        results=results,
        powers=_powers(results),
        questions=[(result, _questions(run_dir / result["answers"])) for result in results],
        config_yaml=(run_dir / "config.yaml").read_text(encoding="utf-8"),
        environment=read_environment(run_dir),
    )


def _powers(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return every k of pass@k, in ascending order."""
    return sorted({k for result in results for k in result.get("pass_at", {})}, key=int)


def _questions(file: Path) -> list[Question]:
    _, *lines = file.read_text(encoding="utf-8").splitlines()
    with_images = [row for row in map(json.loads, lines) if row["images"]]
    wrong_first = sorted(with_images, key=lambda row: bool(row["greedy"]["accuracy"]))
    return [_question(row) for row in wrong_first[:CARDS]]


def _question(row: Mapping[str, Any]) -> Question:
    greedy = row["greedy"]
    return Question(
        id=row["id"],
        question=row["question"],
        truth=row["answer"],
        images=[image for image in row["images"] if PICTURE.fullmatch(image)],
        pieces=pieces_of(greedy["text"]),
        right=greedy["accuracy"] > 0,
        well_formed=greedy["format"] > 0,
        sampled_right=sum(answer["accuracy"] > 0 for answer in row["sampled"]),
        sampled=len(row["sampled"]),
    )
