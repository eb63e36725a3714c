"""Learning rate schedules, as fractions of the peak rate; does not import torch."""

from __future__ import annotations

import math
from collections.abc import Callable


def learning_rate(name: str, step: int, total: int, peak: float, warmup_frac: float = 0.0) -> float:
    """Return the learning rate at `step` (from 0) of `total`: linear warm-up over `warmup_frac`, then the schedule."""
    if name not in LR_SCHEDULES:
        raise ValueError(f"learner.lr_schedule = {name!r} is not a schedule: use one of {', '.join(LR_SCHEDULES)}")
    warmup = round(warmup_frac * total)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    return peak * LR_SCHEDULES[name]((step - warmup) / (total - warmup))


def constant(done: float) -> float:
    return 1.0


def linear(done: float) -> float:
    """Decay linearly to 0."""
    return 1.0 - done


def cosine(done: float) -> float:
    """Decay to 0 along half a cosine wave."""
    return (1.0 + math.cos(math.pi * done)) / 2


# fraction of the steps after warm-up that are done, 0 to 1 -> fraction of the peak rate
LR_SCHEDULES: dict[str, Callable[[float], float]] = {"constant": constant, "linear": linear, "cosine": cosine}
