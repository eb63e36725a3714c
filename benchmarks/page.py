"""The benchmark's HTML page: bars of step times, and a table of checks."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from othink_ray.report.rendering import date, write_page

_COLORS = {"generate": 1, "score": 4, "update": 2, "push": 3, "other": 5, "peer": 0}


def write_bench_page(folder: Path, results: Mapping[str, Any]) -> Path:
    """Write report.html from the content of bench.json, and return its path."""
    return write_page(
        folder,
        "bench.html.j2",
        styles=("style.css.j2",),
        package="benchmarks",
        date=date(time.time()),
        machine=results["machine"],
        colors=_COLORS,
        works=[_bars(measured) for measured in results["works"]],
        checks=results["lines"],
    )


def _bars(measured: Mapping[str, Any]) -> dict[str, Any]:
    sides = [_side(name, side) for name, side in measured["sides"].items()]
    return {"name": measured["name"], "sides": sides, "longest": max(side["step"]["median"] for side in sides)}


def _side(name: str, side: Mapping[str, Any]) -> dict[str, Any]:
    whole = side["step_s"]["median"]
    known = {part: side[f"{part}_s"]["median"] for part in _COLORS if f"{part}_s" in side}
    rest = "other" if known else "peer"
    parts = {**known, rest: max(0.0, whole - sum(known.values()))}
    return {
        "name": name,
        "step": side["step_s"],
        "times": side.get("times_trl"),
        "parts": [{"name": part, "seconds": seconds} for part, seconds in parts.items()],
    }
