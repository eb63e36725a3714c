"""Metrics of a real run as Prometheus scrapes them, under the names that the Grafana dashboard queries."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import ray

from othink_ray.runtime.monitoring import gauge_name
from tests.e2e.conftest import StartRun
from tests.runtime.metrics_scrape import gauges_of, scraped_until

pytestmark = pytest.mark.slow

BOARD = Path(__file__).parents[2] / "launch" / "grafana.json"


def test_every_metric_and_every_dashboard_query_is_scraped(start_run: StartRun) -> None:
    run = start_run("train.steps=1")
    [node] = [node for node in ray.nodes() if node["Alive"]]
    target = f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}"
    [line] = run.steps
    expected = {gauge_name(name): value for name, value in line.items() if value is not None}
    text = scraped_until(target, lambda text: gauges_of(text, run.folder) == expected)
    queried = set(re.findall(r"\bray_\w+", " ".join(expressions(json.loads(BOARD.read_text())))))
    assert {name for name in queried if not re.search(rf"^{name}(\{{| )", text, re.MULTILINE)} == set()


def expressions(board: dict[str, list[dict[str, list[dict[str, str]]]]]) -> list[str]:
    return [target["expr"] for panel in board["panels"] for target in panel["targets"]]
