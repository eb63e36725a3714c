"""A run's incidents (failures recovered from, logged and counted, up to a limit) and its gauges for Prometheus."""

from __future__ import annotations

import json
import math
import re
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import ray
from ray.util.metrics import Gauge

from othink_ray.atomic_write import atomic_write
from othink_ray.runtime.futures import WorkerFailed

KINDS = ("rollout_restarts", "learner_restarts", "reward_restarts", "masked_answers")
_REPEAT_S = 5.0  # Ray's agent drops a gauge that was not set during two of its reports, 20 s


class Incidents:
    """Counts the incidents of one run and keeps the first cause: later failures may be its consequences."""

    def __init__(self, max_restarts: int, log: Callable[[str], None]) -> None:
        self.max_restarts, self.log = max_restarts, log
        self.first_cause = ""
        self.restarts = 0
        self.counts: Counter[str] = Counter()

    def restart(self, kind: str, error: WorkerFailed | str) -> None:
        """Log and count a restart; raise WorkerFailed after faults.max_restarts restarts."""
        cause = str(error).strip()
        self.first_cause = self.first_cause or cause
        if self.restarts >= self.max_restarts:
            raise WorkerFailed(
                f"{_first_line(cause)}; not restarted: {self.restarts} restarts used, faults.max_restarts = "
                f"{self.max_restarts}. Remove the first cause, or raise faults.max_restarts. First cause: "
                f"{self.first_cause}"
            )
        self.restarts += 1
        self.note(kind, f"{_first_line(cause)}: restarting it ({self.restarts} of at most {self.max_restarts})")

    def note(self, kind: str, text: str, count: int = 1) -> None:
        self.counts[kind] += count
        self.log(text)

    def take(self) -> dict[str, float]:
        """Return the counts since the last call, as metrics."""
        counts = {f"faults/{kind}": float(self.counts[kind]) for kind in KINDS}
        self.counts.clear()
        return counts


def _first_line(text: str) -> str:
    return text.partition("\n")[0]


def gauge_name(metric: str) -> str:
    """Return the name under which Ray registers a metric; Prometheus shows it with Ray's prefix, `ray_`."""
    return "othink_ray_" + re.sub(r"\W", "_", metric, flags=re.ASCII)


class Gauges:
    """Gauges of one run, tagged with its folder; while open, `prometheus.json` there lists the scrape targets."""

    def __init__(self, run_dir: Path) -> None:
        self._tags = {"run": str(run_dir)}
        self._targets = run_dir / "prometheus.json"
        self._gauges: dict[str, Gauge] = {}
        self._values: Mapping[str, float] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._repeat, name="gauges", daemon=True)

    def __enter__(self) -> Self:
        nodes = [node for node in ray.nodes() if node["Alive"]]
        targets = [f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}" for node in nodes]
        atomic_write(self._targets, json.dumps([{"targets": targets, "labels": {"job": "ray"}}]) + "\n")
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._targets.unlink(missing_ok=True)

    def show(self, metrics: Mapping[str, float]) -> None:
        """Set each metric's gauge to its latest value; a metric that is not finite now is no longer exported."""
        for name in metrics.keys() - self._gauges.keys():
            self._gauges[name] = Gauge(gauge_name(name), description=f"{name} of the last step", tag_keys=("run",))
        latest = {**self._values, **metrics}
        self._values = {name: value for name, value in latest.items() if math.isfinite(value)}
        self._set()

    def _set(self) -> None:
        for name, value in self._values.items():
            self._gauges[name].set(value, self._tags)

    def _repeat(self) -> None:
        while not self._stop.wait(_REPEAT_S):
            self._set()
