"""Whole runs through the command line, as a user starts them; they share one warm-started model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

SMALL = (
    "model.tiny.warm_steps=60",
    "model.tiny.warm_lr=2e-3",
    "model.tiny.warm_batch=32",
    "train.steps=4",
    "train.prompts_per_step=4",
    "train.checkpoint_every=2",
    "algo.group_size=4",
    "eval.questions=16",
    "eval.every=0",
)


@dataclass(frozen=True)
class Run:
    """A finished run: its folder, and what the screen said."""

    folder: Path
    screen: str

    @property
    def steps(self) -> list[dict[str, float]]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    @property
    def summary(self) -> dict[str, dict[str, float]]:
        found: dict[str, dict[str, float]] = json.loads((self.folder / "summary.json").read_text())
        return found


StartRun = Callable[..., Run]


@pytest.fixture(scope="session")
def start_run(tmp_path_factory: pytest.TempPathFactory) -> StartRun:
    cache = tmp_path_factory.mktemp("cache")

    def start(*overrides: str, folder: Path | None = None) -> Run:
        run_dir = folder or tmp_path_factory.mktemp("run")
        command = [sys.executable, "-m", "othink_ray.main", *SMALL, f"run.dir={run_dir}", f"run.cache_dir={cache}"]
        done = subprocess.run(
            [*command, *overrides], capture_output=True, text=True, timeout=280, env=os.environ | {"CI": "true"}
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return Run(folder=run_dir, screen=done.stdout)

    return start


@pytest.fixture(scope="session")
def plain_run(start_run: StartRun) -> Run:
    """One rank, one rollout actor, wandb offline."""
    return start_run("wandb.mode=offline")
