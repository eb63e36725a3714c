"""Greedy accuracy on held-out questions."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from othink_ray.data import BadRow, Screen, Source, SourceError
from othink_ray.types import Prompt, ScoredGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """One pass over the held-out questions; `lo` and `hi` bound the accuracy with 95 % confidence."""

    accuracy: float
    lo: float
    hi: float
    format: float
    n: int
    tokens_mean: float


def summarise(scored: Iterable[ScoredGroup]) -> Evaluation:
    """One greedy answer a question."""
    groups = list(scored)
    right = [float(one.parts["accuracy"][0]) if one.valid[0] else 0.0 for one in groups]
    formed = [float(one.parts["format"][0]) if one.valid[0] else 0.0 for one in groups]
    lo, hi = wilson(sum(right), len(right))
    return Evaluation(
        accuracy=float(np.mean(right)),
        lo=lo,
        hi=hi,
        format=float(np.mean(formed)),
        n=len(groups),
        tokens_mean=float(np.mean([len(one.group.completions[0].token_ids) for one in groups])),
    )


def held_out_prompts(
    source: Source, count: int, on_bad_row: str, screen: Screen | None = None
) -> tuple[list[Prompt], list[BadRow]]:
    """The first `count` good rows, fewer where there are no more, and the bad ones among them."""
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


def wilson(successes: float, trials: int, z: float = 1.96) -> tuple[float, float]:
    """The Wilson score interval of a share: sound at 0, at 1 and for few trials."""
    share = successes / trials
    scale = 1 + z**2 / trials
    centre = (share + z**2 / (2 * trials)) / scale
    half = z * math.sqrt(share * (1 - share) / trials + z**2 / (4 * trials**2)) / scale
    return max(0.0, centre - half), min(1.0, centre + half)
