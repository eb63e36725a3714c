"""Summaries of step times."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

WARM_UP = 3  # steps excluded on both sides: the peer still compiles in its second
PARTS = ("generate", "score", "update", "push")


def spreads(metrics: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Summarize the seconds of whole steps and of their phases, from the lines of a run's metrics.jsonl."""
    return {f"{part}_s": spread([line[f"time/{part}_s"] for line in metrics]) for part in ("step", *PARTS)}


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "count": len(values)}
