"""Step times and what is said of them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

WARM_UP = 3  # steps that are left out on both sides: the peer still compiles in its second


PARTS = ("generate", "score", "update", "push")


def spreads(lines: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Of whole steps and of their parts, from a run's metrics."""
    return {f"{part}_s": spread([line[f"time/{part}_s"] for line in lines]) for part in ("step", *PARTS)}


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "count": len(values)}
