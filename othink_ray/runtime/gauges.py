"""A run's numbers as Ray gauges: the metrics agent of the driver's node shows them to Prometheus."""

from __future__ import annotations

import json
import math
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import ray
from ray.util.metrics import Gauge

from othink_ray.whole_file import write_whole

AGAIN_S = 5.0  # Ray's agent forgets what was not set for two of its reports, 20 s


def gauge_name(metric: str) -> str:
    """As Ray is told; Prometheus sees it with Ray's own prefix, `ray_`."""
    return "othink_ray_" + re.sub(r"\W", "_", metric, flags=re.ASCII)


class Gauges:
    """Of one run, tagged with its folder; while it is open, `prometheus.json` there says where to scrape."""

    def __init__(self, run_dir: Path) -> None:
        self._tags = {"run": str(run_dir)}
        self._targets = run_dir / "prometheus.json"
        self._gauges: dict[str, Gauge] = {}
        self._values: Mapping[str, float] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._repeat, name="gauges", daemon=True)

    def __enter__(self) -> Self:
        nodes = [node for node in ray.nodes() if node["Alive"]]
        targets = [f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}" for node in nodes]
        write_whole(self._targets, json.dumps([{"targets": targets, "labels": {"job": "ray"}}]) + "\n")
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        self._targets.unlink(missing_ok=True)

    def show(self, metrics: Mapping[str, float]) -> None:
        """The latest of each name; one that is not finite now is shown no longer."""
        for name in metrics.keys() - self._gauges.keys():
            self._gauges[name] = Gauge(gauge_name(name), description=f"{name} of the last step", tag_keys=("run",))
        known = {**self._values, **metrics}
        self._values = {name: value for name, value in known.items() if math.isfinite(value)}
        self._set()

    def _set(self) -> None:
        for name, value in self._values.items():
            self._gauges[name].set(value, self._tags)

    def _repeat(self) -> None:
        while not self._over.wait(AGAIN_S):
            self._set()
