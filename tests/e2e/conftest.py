"""Whole runs, started as a user does; they share one Ray and one warm-started model."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest

from othink_ray.main import main

SMALL = (
    "model.tiny.warm_steps=40",
    "model.tiny.warm_lr=2e-3",
    "model.tiny.warm_batch=16",
    "train.steps=4",
    "train.prompts_per_step=4",
    "train.checkpoint_every=2",
    "algo.group_size=4",
    "eval.questions=16",
    "eval.every=0",
)


@dataclass(frozen=True)
class Run:
    """A finished run: its folder and its output."""

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
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the base model, which the first run makes and all others reuse."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def start_run(ray_here: None, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> StartRun:
    """Return a function that does a whole run on the shared Ray, through the command line's entry point."""

    def start(*overrides: str, folder: Path | None = None) -> Run:
        run_dir = folder or tmp_path_factory.mktemp("run")
        screen = io.StringIO()
        with redirect_stdout(screen):
            status = main([*SMALL, f"run.dir={run_dir}", f"run.cache_dir={cache}", *overrides])
        assert status == 0, screen.getvalue()
        return Run(folder=run_dir, screen=screen.getvalue())

    return start


@pytest.fixture(scope="session")
def plain_run(start_run: StartRun) -> Run:
    """Run with one rank, one rollout actor and wandb offline."""
    return start_run("wandb.mode=offline")


@pytest.fixture(scope="session")
def overlapped(start_run: StartRun) -> Run:
    """Run with overlap: the next step is generated during the update of this one."""
    return start_run("train.overlap=true", "train.steps=3")


@pytest.fixture(scope="session")
def overlapped_alone(start_run: StartRun) -> Run:
    """Run with overlap, but without prefetch beside an update."""
    return start_run("train.overlap=true", "train.steps=3", "train.prefetch_update=false")
