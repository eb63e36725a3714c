"""The machine, as far as ratios depend on it: on another processor the same work is shared out otherwise."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def machine(cpus: Path = Path("/proc/cpuinfo")) -> str:
    """Its processor and number of cores; family and model tell apart what is sold under one name."""
    known = _first_processor(cpus)
    numbers = [f"{key} {known[key]}" for key in ("cpu family", "model") if key in known]
    return ", ".join([known.get("model name", platform.machine()), *numbers, f"{os.cpu_count()} cores"])


def _first_processor(cpus: Path) -> dict[str, str]:
    try:
        lines = cpus.read_text().split("\n\n")[0].splitlines()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in lines)
    return {key.strip(): value.strip() for key, colon, value in pairs if colon}
