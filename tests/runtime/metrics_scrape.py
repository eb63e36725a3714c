"""Scrapes of Ray's metrics agent, as Prometheus makes them."""

from __future__ import annotations

import re
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

_LINE = re.compile(r"^ray_(?P<name>othink_ray_\w+)\{(?P<labels>.*)\} (?P<value>\S+)$", re.MULTILINE)


def scraped_until(target: str, holds: Callable[[str], bool], within_s: float = 30.0) -> str:
    """Return the first scrape for which `holds` is true; processes report to the agent every 10 s."""
    until = time.monotonic() + within_s
    while True:
        with urllib.request.urlopen(f"http://{target}/metrics", timeout=10) as answer:
            text: str = answer.read().decode()
        if holds(text):
            return text
        assert time.monotonic() < until, text
        time.sleep(0.5)


def gauges_of(text: str, run_dir: Path) -> dict[str, float]:
    """Return the values of one run's gauges by the names registered with Ray."""
    lines = [match for match in _LINE.finditer(text) if f'run="{run_dir}"' in match["labels"]]
    return {match["name"]: float(match["value"]) for match in lines}
