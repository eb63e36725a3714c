"""The order in which the models of a team are loaded, seen by real actors."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from othink_ray.config.schema import Config
from othink_ray.driver.build import load_models
from othink_ray.engines.base import RendezvousInfo
from othink_ray.runtime.learner_pool import LearnerPool
from othink_ray.runtime.placement import Placement, ProcessSpec
from othink_ray.runtime.rollout_pool import RolloutPool
from tests.runtime.conftest import incidents

LOADING_S = 0.5
SEATS = [(ProcessSpec(role="learner", cpus=0.1, gpus=0), ProcessSpec(role="rollout", cpus=0.1, gpus=0))]


def note(diary: Path, event: str) -> None:
    with diary.open("a") as lines:
        lines.write(f"{event}\n")


class Diarist:
    """An engine that loads for a while and writes down what happens to it."""

    version = 0

    def __init__(self, diary: Path) -> None:
        self.diary = diary
        note(diary, "engine loads")
        time.sleep(LOADING_S)
        note(diary, "engine is ready")

    def sleep(self) -> None:
        note(self.diary, "engine sleeps")


def learner_engine(diary: Path, place: RendezvousInfo) -> None:
    note(diary, "learner loads")
    time.sleep(2 * LOADING_S)
    note(diary, "learner is ready")


def events(config: Config, diary: Path) -> list[str]:
    with Placement(SEATS, config.cluster, print) as placement:
        learner = LearnerPool(partial(learner_engine, diary), config.learner, placement)  # type: ignore[arg-type]
        rollout = RolloutPool(partial(Diarist, diary), config.rollout, placement, incidents())  # type: ignore[arg-type]
        load_models(config, rollout, learner)
    return diary.read_text().splitlines()


@pytest.mark.usefixtures("ray_here")
def test_on_a_shared_gpu_the_learner_loads_beside_sleeping_engines(team_config: Config, tmp_path: Path) -> None:
    shared = replace(
        team_config,
        rollout=replace(team_config.rollout, gpus_per_actor=0.5, sleep=True),
        learner=replace(team_config.learner, gpus_per_rank=0.5),
    )
    expected = ["engine loads", "engine is ready", "engine sleeps", "learner loads", "learner is ready"]
    assert events(shared, tmp_path / "diary") == expected


@pytest.mark.usefixtures("ray_here")
def test_on_devices_of_their_own_both_load_side_by_side(team_config: Config, tmp_path: Path) -> None:
    seen = events(team_config, tmp_path / "diary")
    assert seen.index("learner loads") < seen.index("learner is ready")
    assert "engine sleeps" not in seen
