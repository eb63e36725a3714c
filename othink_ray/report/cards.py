"""Sampled groups as cards: the picture, the question, and each answer with what it earned."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from othink_ray.report.records import is_finite

TAG = re.compile(r"(</?(?:think|answer)>)")
PICTURE = re.compile(r"data:image/(?:png|jpeg);base64,[A-Za-z0-9+/=]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One answer; the bar of its advantage starts at the middle, `bar_left` and `bar_width` are in percent."""

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
    answers: Sequence[Answer]


def cards(samples: Sequence[Mapping[str, Any]]) -> list[Card]:
    """One card for the first, the middle and the last sampled step, so that early and late answers stand together."""
    steps = sorted({sample["step"] for sample in samples})
    if not steps:
        return []
    chosen = sorted({steps[0], steps[len(steps) // 2], steps[-1]})
    names = {1: ["only"], 2: ["early", "late"], 3: ["early", "midway", "late"]}[len(chosen)]
    return [
        _card(when, _most_telling([sample for sample in samples if sample["step"] == step]))
        for when, step in zip(names, chosen, strict=True)
    ]


def _most_telling(samples: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The first group whose answers differ in reward; the first of all when none does."""
    mixed = [one for one in samples if len({answer["reward"] for answer in one["completions"]}) > 1]
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
        answers=[_answer(answer, largest) for answer in sample["completions"]],
    )


def _answer(answer: Mapping[str, Any], largest_advantage: float) -> Answer:
    advantage = _number(answer["advantage"])
    width = 50 * abs(advantage) / largest_advantage if advantage and is_finite(advantage) else 0.0
    return Answer(
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


def pieces_of(text: str) -> list[tuple[bool, str]]:
    """An answer taken apart at its tags: (is a tag, text)."""
    return [(bool(TAG.fullmatch(piece)), piece) for piece in TAG.split(text) if piece]


def _number(value: float | None) -> float:
    """A number from the records, where null stands for one that was not finite."""
    return float("nan") if value is None else float(value)
