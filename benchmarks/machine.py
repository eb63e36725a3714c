"""Description of the processor: on another one, phases take different shares of a step, so speedups differ."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def machine(cpus: Path = Path("/proc/cpuinfo")) -> str:
    """Return processor and core count; family and model distinguish processors sold under one name."""
    fields = _first_processor(cpus)
    numbers = [f"{key} {fields[key]}" for key in ("cpu family", "model") if key in fields]
    return ", ".join([fields.get("model name", platform.machine()), *numbers, f"{os.cpu_count()} cores"])


def _first_processor(cpus: Path) -> dict[str, str]:
    try:
        lines = cpus.read_text().split("\n\n")[0].splitlines()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in lines)
    return {key.strip(): value.strip() for key, colon, value in pairs if colon}
