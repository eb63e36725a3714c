"""Gauges of a run as Prometheus scrapes them from the metrics agent of a real Ray."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from othink_ray.runtime import monitoring
from othink_ray.runtime.monitoring import Gauges
from tests.runtime.metrics_scrape import gauges_of, scraped_until

DROPPED_S = 25.0  # Ray's agent keeps a value for 20 s


@pytest.mark.parametrize("removed", [False, True])
def test_the_target_file_is_removed_with_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, removed: bool
) -> None:
    monkeypatch.setattr(monitoring, "ray", SimpleNamespace(nodes=list))
    file = tmp_path / "prometheus.json"
    with Gauges(tmp_path):
        assert file.exists()
        if removed:
            file.unlink()
    assert not file.exists()


@pytest.mark.slow
def test_the_latest_finite_values_are_exported_during_the_run(ray_here: None, tmp_path: Path) -> None:
    with Gauges(tmp_path) as gauges:
        [entry] = json.loads((tmp_path / "prometheus.json").read_text())
        [target] = entry["targets"]
        gauges.show({"kl/mean": 0.5, "eval/accuracy/my-own": 0.25})
        gauges.show({"kl/mean": math.nan, "step": 3})
        expected = {"othink_ray_eval_accuracy_my_own": 0.25, "othink_ray_step": 3.0}
        scraped_until(target, lambda text: gauges_of(text, tmp_path) == expected)
        time.sleep(DROPPED_S)
        scraped_until(target, lambda text: gauges_of(text, tmp_path) == expected, within_s=2.0)
    assert not (tmp_path / "prometheus.json").exists()
