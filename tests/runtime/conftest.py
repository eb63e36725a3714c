"""One real WorkerGroup on the shared Ray: vLLM, DeepSpeed and rewards in their actors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from othink_ray.config.load import load
from othink_ray.config.schema import Config
from othink_ray.core.advantages import group_advantages
from othink_ray.core.packing import pack
from othink_ray.data import open_source
from othink_ray.driver.build import open_workers
from othink_ray.engines.policy import Policy
from othink_ray.families.base import Family
from othink_ray.runtime.monitoring import Incidents
from othink_ray.runtime.worker_group import WorkerGroup
from othink_ray.types import Prompt, UpdateRequest, UpdateSettings


def incidents(max_restarts: int = 3) -> Incidents:
    return Incidents(max_restarts, log=print)


def train_one_step(workers: WorkerGroup, prompts: list[Prompt], step: int, lr: float = 2e-4) -> None:
    """Train one real step on rewards that differ, so that all weights move as in training."""
    scored = workers.score(workers.generate(prompts, step))
    rigged = [replace(group, rewards=np.arange(len(group.rewards), dtype=float)) for group in scored]
    packs = [pack(group, group_advantages(group.rewards, group.valid), len(rigged)) for group in rigged]
    settings = UpdateSettings(beta=0.04, lr=lr, loss="grpo", tis="none")
    workers.sleep()
    update = workers.begin_update(UpdateRequest(packs=packs, updates=1, settings=settings))
    workers.begin_push()
    workers.finish_update(update)


@pytest.fixture(scope="session")
def workers_config() -> Config:
    return load(["algo.group_size=4", "train.prompts_per_step=4", "algo.reward.timeout_s=5", "rollout.max_tokens=24"])


@pytest.fixture(scope="session")
def prompts(workers_config: Config) -> list[Prompt]:
    source = open_source(workers_config.data, "test")
    return [source.prompt(index) for index in range(4)]


@pytest.fixture(scope="session")
def taught_folder(family: Family, taught: Policy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("taught")
    family.save(folder, taught.network, taught.network.named_parameters())
    return folder


@pytest.fixture(scope="session")
def workers(
    ray_here: None, workers_config: Config, taught_folder: Path, prompts: list[Prompt]
) -> Iterator[WorkerGroup]:
    with open_workers(workers_config, str(taught_folder), prompts, incidents(), print) as opened:
        yield opened
