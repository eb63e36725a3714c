"""One engine in two processes, each with half of every matrix."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from othink_ray.config.schema import Config
from othink_ray.driver.build import open_workers
from othink_ray.types import Prompt
from tests.engines.samples import ask, picture
from tests.runtime.conftest import incidents, train_one_step

ROUNDING = 1e-5  # nats


def test_an_engine_of_two_processes_gets_every_weight_of_every_push(
    ray_here: None, team_config: Config, taught_folder: Path, asked: list[Prompt]
) -> None:
    split = replace(team_config, rollout=replace(team_config.rollout, tensor_parallel=2))
    with open_workers(split, str(taught_folder), asked, incidents(), print, tuple) as team:
        assert team.push(0).gap_mean < ROUNDING
        train_one_step(team, asked, 0)
        assert team.push(1).gap_mean < ROUNDING
        new = [ask(f"q{seed}", picture(56, 56, seed)) for seed in range(3)]
        scored = team.score(team.generate(new, 1))
    assert sum(one.group.image_encodes for one in scored) == len(new)
