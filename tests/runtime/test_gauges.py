"""What a run shows to Prometheus, as Prometheus gets it: from the metrics agent of a real Ray."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from othink_ray.runtime import monitoring
from othink_ray.runtime.monitoring import Gauges
from tests.runtime.scraping import gauges_of, scraped_until

FORGOTTEN_S = 25.0  # Ray's agent keeps a value for 20 s


@pytest.mark.parametrize("gone", [False, True])
def test_the_file_goes_with_the_run_or_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gone: bool) -> None:
    monkeypatch.setattr(monitoring, "ray", SimpleNamespace(nodes=list))
    file = tmp_path / "prometheus.json"
    with Gauges(tmp_path):
        assert file.exists()
        if gone:
            file.unlink()
    assert not file.exists()


def test_the_latest_finite_numbers_are_there_as_long_as_the_run_is(ray_here: None, tmp_path: Path) -> None:
    with Gauges(tmp_path) as shown:
        [entry] = json.loads((tmp_path / "prometheus.json").read_text())
        [target] = entry["targets"]
        shown.show({"kl/mean": 0.5, "eval/accuracy/my-own": 0.25})
        shown.show({"kl/mean": math.nan, "step": 3})
        expected = {"othink_ray_eval_accuracy_my_own": 0.25, "othink_ray_step": 3.0}
        scraped_until(target, lambda text: gauges_of(text, tmp_path) == expected)
        time.sleep(FORGOTTEN_S)
        scraped_until(target, lambda text: gauges_of(text, tmp_path) == expected, within_s=2.0)
    assert not (tmp_path / "prometheus.json").exists()
