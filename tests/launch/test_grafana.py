"""Layout and queries of the Grafana dashboard; tests/e2e/test_gauges.py checks its metric names on a real run."""

from __future__ import annotations

import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

FILE = Path(__file__).parents[2] / "launch" / "grafana.json"


@pytest.fixture
def board() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(FILE.read_text())
    return found


def test_panels_have_distinct_ids_and_do_not_overlap(board: dict[str, Any]) -> None:
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    boxes = [panel["gridPos"] for panel in panels]
    assert all(box["x"] >= 0 and box["x"] + box["w"] <= 24 for box in boxes)
    for one, other in combinations(boxes, 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        below = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or below


def test_every_query_uses_the_chosen_source_and_is_balanced(board: dict[str, Any]) -> None:
    variables = {variable["name"]: variable for variable in board["templating"]["list"]}
    assert variables["datasource"]["query"] == "prometheus"
    for panel in board["panels"]:
        assert [target["refId"] for target in panel["targets"]] == list("ABCD")[: len(panel["targets"])]
        for target in panel["targets"]:
            assert target["datasource"] == panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
            assert set(re.findall(r"\$(\w+)", target["expr"])) <= variables.keys()
            assert all(target["expr"].count(left) == target["expr"].count(right) for left, right in ("()", "{}"))


def test_queries_are_filtered_by_the_chosen_runs(board: dict[str, Any]) -> None:
    queries = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    assert all('{run=~"$run"}' in query for query in queries if "othink_ray" in query)


@pytest.mark.parametrize(
    "title", ["Reward", "Accuracy", "KL weight", "KL", "Audit gap", "Throughput", "Memory of nodes"]
)
def test_the_important_panels_exist(board: dict[str, Any], title: str) -> None:
    assert title in [panel["title"] for panel in board["panels"]]


def test_the_times_of_a_step_are_stacked_to_its_length(board: dict[str, Any]) -> None:
    [panel] = [panel for panel in board["panels"] if panel["title"] == "Seconds per step"]
    assert panel["fieldConfig"]["defaults"]["custom"]["stacking"]["mode"] == "normal"
    names = [re.findall(r"time_(\w+)_s", target["expr"]) for target in panel["targets"]]
    assert names == [["generate"], ["score"], ["update"], ["push"]]
