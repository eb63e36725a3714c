"""The learning rate of a whole run, as a share of its peak; loads no torch."""

from __future__ import annotations

import math
from collections.abc import Callable


def learning_rate(name: str, step: int, total: int, peak: float, warmup_frac: float = 0.0) -> float:
    """The rate at `step` (from 0) of `total`: a straight rise over a share of the steps, then the named schedule."""
    if name not in LR_SCHEDULES:
        raise ValueError(f"learner.lr_schedule = {name!r} is not a schedule: use one of {', '.join(LR_SCHEDULES)}")
    warmup = round(warmup_frac * total)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    return peak * LR_SCHEDULES[name]((step - warmup) / (total - warmup))


def constant(done: float) -> float:
    return 1.0


def linear(done: float) -> float:
    """A straight line to 0."""
    return 1.0 - done


def cosine(done: float) -> float:
    """Half a cosine wave to 0."""
    return (1.0 + math.cos(math.pi * done)) / 2


# share of the run after the warm-up that is done, 0 to 1 -> share of the peak
LR_SCHEDULES: dict[str, Callable[[float], float]] = {"constant": constant, "linear": linear, "cosine": cosine}
