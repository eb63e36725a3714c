"""Order in which the models of a WorkerGroup are loaded, recorded by real actors."""

from __future__ import annotations

import time
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from othink_ray.config.schema import Config
from othink_ray.cpu.kernels import SlowerKernel
from othink_ray.driver.build import load_models
from othink_ray.engines.base import RendezvousInfo
from othink_ray.runtime.bundles import ProcessSpec, learner_bundles
from othink_ray.runtime.learner_pool import LearnerPool
from othink_ray.runtime.placement import Placement
from othink_ray.runtime.rollout_pool import RolloutPool
from tests.runtime.conftest import incidents

LOADING_S = 0.5
BUNDLES = [(ProcessSpec(role="learner", cpus=0.1, gpus=0), ProcessSpec(role="rollout", cpus=0.1, gpus=0))]


def record(log: Path, event: str) -> None:
    with log.open("a") as lines:
        lines.write(f"{event}\n")


class SlowEngine:
    """An engine that loads for a while and records its events in a file."""

    version = 0

    def __init__(self, log: Path) -> None:
        self.log = log
        record(log, "engine loads")
        time.sleep(LOADING_S)
        record(log, "engine is ready")

    def sleep(self) -> None:
        record(self.log, "engine sleeps")


def learner_engine(log: Path, rendezvous: RendezvousInfo) -> None:
    record(log, "learner loads")
    time.sleep(2 * LOADING_S)
    record(log, "learner is ready")


def events(config: Config, log: Path) -> list[str]:
    with Placement(BUNDLES, config.cluster, print) as placement:
        learner = LearnerPool(partial(learner_engine, log), config.learner, placement)  # type: ignore[arg-type]
        rollout = RolloutPool(partial(SlowEngine, log), config.rollout, placement, incidents())  # type: ignore[arg-type]
        load_models(config, rollout, learner)
    return log.read_text().splitlines()


@pytest.mark.usefixtures("ray_here")
def test_on_a_shared_gpu_the_learner_loads_after_engines_sleep(workers_config: Config, tmp_path: Path) -> None:
    shared = replace(
        workers_config,
        rollout=replace(workers_config.rollout, gpus_per_actor=0.5, sleep=True),
        learner=replace(workers_config.learner, gpus_per_rank=0.5),
    )
    expected = ["engine loads", "engine is ready", "engine sleeps", "learner loads", "learner is ready"]
    assert events(shared, tmp_path / "events") == expected


@pytest.mark.slow
@pytest.mark.usefixtures("ray_here")
def test_on_separate_devices_both_load_concurrently(workers_config: Config, tmp_path: Path) -> None:
    seen = events(workers_config, tmp_path / "events")
    assert seen.index("learner loads") < seen.index("learner is ready")
    assert "engine sleeps" not in seen


def warning_engine(rendezvous: RendezvousInfo) -> None:
    warnings.warn("a line for the log", stacklevel=1)
    warnings.warn("no compiler", SlowerKernel, stacklevel=1)
    warnings.warn(f"rank {rendezvous.rank} is slow", SlowerKernel, stacklevel=1)


@pytest.mark.usefixtures("ray_here")
def test_warnings_about_slower_kernels_arrive_once(workers_config: Config) -> None:
    settings = replace(workers_config.learner, world_size=2, cpus_per_rank=0.1)
    with Placement(learner_bundles(settings), workers_config.cluster, print) as placement:
        learner = LearnerPool(warning_engine, settings, placement)  # type: ignore[arg-type]
        assert learner.wait(learner.start()) == ["no compiler", "rank 0 is slow", "rank 1 is slow"]
