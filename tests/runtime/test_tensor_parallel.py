"""One engine over two processes (tensor parallel), each with half of every matrix."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from othink_ray.config.schema import Config
from othink_ray.driver.build import open_workers
from othink_ray.types import Prompt
from tests.engines.samples import ask, picture
from tests.runtime.conftest import incidents, train_one_step

pytestmark = pytest.mark.slow

ROUNDING = 1e-5  # nats


def test_a_tensor_parallel_engine_receives_every_weight(
    ray_here: None, workers_config: Config, taught_folder: Path, prompts: list[Prompt]
) -> None:
    split = replace(workers_config, rollout=replace(workers_config.rollout, tensor_parallel=2))
    with open_workers(split, str(taught_folder), prompts, incidents(), print) as workers:
        assert workers.push(0).gap_mean < ROUNDING
        train_one_step(workers, prompts, 0)
        assert workers.push(1).gap_mean < ROUNDING
        new = [ask(f"q{seed}", picture(56, 56, seed)) for seed in range(3)]
        scored = workers.score(workers.generate(new, 1))
    assert sum(result.group.image_encodes for result in scored) == len(new)
