"""Held-out questions, and what the answers to them say: accuracy, its interval, mean@k and pass@k."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from othink_ray.config.load import data_named
from othink_ray.config.schema import Config
from othink_ray.core.intervals import wilson
from othink_ray.data import BadRow, Screen, Source, SourceError, open_source
from othink_ray.data.prompts import with_grey_images
from othink_ray.types import Prompt, ScoredGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class Exam:
    """The held-out questions of one data set, and those of its rows that cannot be asked."""

    name: str
    prompts: Sequence[Prompt]
    bad_rows: Sequence[BadRow]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """One pass over the held-out questions; `lo` and `hi` bound the accuracy with 95 % confidence."""

    accuracy: float
    lo: float
    hi: float
    format: float
    n: int
    tokens_mean: float


def exams(config: Config, screen: Screen) -> list[Exam]:
    """The run's own data set first, then those of eval.also; each with its blind twin where data.blind asks for one."""
    found = []
    for data in (config.data, *(data_named(name) for name in config.eval.also)):
        good, bad = held_out_prompts(open_source(data, "test"), config.eval.questions, data.on_bad_row, screen)
        found.append(Exam(name=data.name, prompts=good, bad_rows=bad))
        if data.blind:
            unseen = [with_grey_images(prompt) for prompt in good]
            found.append(Exam(name=f"{data.name}-blind", prompts=unseen, bad_rows=[]))
    return found


def graded(scored: ScoredGroup) -> list[dict[str, Any]]:
    """Each answer of a group as plain values; one whose scoring failed counts as wrong."""
    return [
        {
            "text": answer.text,
            "accuracy": float(scored.parts["accuracy"][place]) if scored.valid[place] else 0.0,
            "format": float(scored.parts["format"][place]) if scored.valid[place] else 0.0,
            "tokens": len(answer.token_ids),
            "finish": answer.finish,
        }
        for place, answer in enumerate(scored.group.completions)
    ]


def summarise(answers: Iterable[dict[str, Any]]) -> Evaluation:
    """Of one greedy answer a question, as `graded` gives them."""
    rows = list(answers)
    right = [row["accuracy"] for row in rows]
    lo, hi = wilson(sum(right), len(right))
    return Evaluation(
        accuracy=float(np.mean(right)),
        lo=lo,
        hi=hi,
        format=float(np.mean([row["format"] for row in rows])),
        n=len(rows),
        tokens_mean=float(np.mean([row["tokens"] for row in rows])),
    )


def held_out_prompts(
    source: Source, count: int | None, on_bad_row: str, screen: Screen | None = None
) -> tuple[list[Prompt], list[BadRow]]:
    """The first `count` good rows (None: all), fewer where there are no more, and the bad ones among them."""
    good: list[Prompt] = []
    bad: list[BadRow] = []
    for index in range(len(source)):
        if len(good) == count:
            break
        try:
            prompt = source.prompt(index)
            if screen is not None:
                screen(prompt)
        except BadRow as row:
            if on_bad_row == "stop":
                raise
            bad.append(row)
        else:
            good.append(prompt)
    if not good:
        raise SourceError(f"all {len(source)} held-out rows are bad, the first one: {bad[0]}; check data.test")
    return good, bad


def pass_at(k: int, right: int, sampled: int) -> float:
    """The chance that at least one of k answers is right, drawn without repeats from `sampled` of which so many are."""
    return 1.0 - math.comb(sampled - right, k) / math.comb(sampled, k)
