"""Reader of a run's folder in any state: running, stopped in the middle of a line, or finished."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

EVALUATION = ("accuracy", "lo", "hi", "format", "n", "tokens_mean")


def is_finite(value: object) -> bool:
    """Return whether a value is a finite number; the records hold null for NaN and infinity."""
    return isinstance(value, int | float) and math.isfinite(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFiles:
    """Frozen record of a run's files so far; `summary` is empty until the run is finished."""

    config_yaml: str
    config: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    samples: Sequence[Mapping[str, Any]]
    summary: Mapping[str, Any]
    environment: Mapping[str, Any]
    incidents: Sequence[tuple[float, str]]  # (unix seconds, text)
    unreadable_lines: int

    def evaluation(self, when: str) -> Mapping[str, float] | None:
        """Return the evaluation "before" or "after" training; None if it is absent or has a non-finite number."""
        result = self.summary.get(when) or {}
        if not all(is_finite(result.get(name)) for name in EVALUATION):
            return None
        return {name: float(result[name]) for name in EVALUATION}


def read_run(run_dir: Path) -> RunFiles:
    """Read a run's files; only config.yaml must exist."""
    config_file = run_dir / "config.yaml"
    if not config_file.is_file():
        raise FileNotFoundError(
            f"{config_file} does not exist: a report needs a run's folder (run.dir), which has a config.yaml"
        )
    config_yaml = config_file.read_text(encoding="utf-8")
    config = OmegaConf.to_container(OmegaConf.create(config_yaml))
    rows, bad_rows = _read_lines(run_dir / "metrics.jsonl")
    samples, bad_samples = _read_lines(run_dir / "samples.jsonl")
    return RunFiles(
        config_yaml=config_yaml,
        config={str(key): value for key, value in config.items()} if isinstance(config, dict) else {},
        rows=rows,
        samples=samples,
        summary=_read_object(run_dir / "summary.json"),
        environment=read_environment(run_dir),
        incidents=_read_incidents(run_dir / "incidents.jsonl"),
        unreadable_lines=bad_rows + bad_samples,
    )


def read_environment(run_dir: Path) -> Mapping[str, Any]:
    """Return versions, machines and command of the run; empty for runs of versions that did not record them."""
    return _read_object(run_dir / "environment.json")


def _read_object(path: Path) -> Mapping[str, Any]:
    content: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return content


def _read_incidents(path: Path) -> list[tuple[float, str]]:
    """Return the readable incidents: a run may have ended while writing one."""
    incidents = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else []:
        try:
            record = json.loads(line)
            incidents.append((float(record["unix_s"]), str(record["text"])))
        except (ValueError, TypeError, KeyError):
            continue
    return incidents


def _read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the records of a JSONL file that have a step, sorted by step, and the number of unreadable lines."""
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else []
    records: list[dict[str, Any]] = []
    unreadable = 0
    for line in filter(None, lines):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
        else:
            unreadable += 1
    return sorted(records, key=lambda record: int(record["step"])), unreadable
