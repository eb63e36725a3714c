"""The kept base model belongs to exactly one recipe."""

from __future__ import annotations

import pytest

from othink_ray.config.load import load
from othink_ray.config.model_rules import base_model_folder


@pytest.mark.parametrize(
    "override",
    [
        "model.tiny.warm_steps=7",
        "model.tiny.warm_questions=12",
        "model.tiny.seed=1",
        "data.scenes.max_items=4",
        "learner.adam_eps=1e-9",
        "model.dtype=bfloat16",
    ],
)
def test_whatever_shapes_the_base_model_gives_it_another_folder(override: str) -> None:
    assert base_model_folder(load([override])) != base_model_folder(load([]))


@pytest.mark.parametrize(
    "override", ["train.seed=5", "algo=grpo", "learner.world_size=2", "learner.lr=1e-3", "rollout.num_actors=2"]
)
def test_runs_that_differ_only_in_training_share_it(override: str) -> None:
    assert base_model_folder(load([override])) == base_model_folder(load([]))
