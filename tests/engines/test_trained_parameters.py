"""Trained and frozen parameters, and whether a push brings every weight."""

from __future__ import annotations

import pytest
import torch

from othink_ray.config.load import load
from othink_ray.engines.policy import choose_trained, count_trained, trains_all
from othink_ray.families.base import Family


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ([], True),
        (["learner.lora.rank=8"], False),
        (["learner.freeze=vision"], False),
        (["learner.freeze=vision", "learner.lora.rank=8"], False),
    ],
)
def test_all_is_trained_only_without_adapters_and_freezing(keys: list[str], expected: bool) -> None:
    assert trains_all(load(keys).learner) == expected


@pytest.mark.parametrize("keys", [[], ["learner.freeze=vision"], ["learner.freeze=projector"], ["learner.lora.rank=4"]])
def test_the_count_before_loading_matches_trained_elements(small_family: Family, keys: list[str]) -> None:
    learner = load(keys).learner
    network = small_family.load_network(torch.float32)
    choose_trained(small_family, network, learner)
    trained = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
    assert count_trained(small_family, learner) == trained
    assert (trained == sum(parameter.numel() for parameter in network.parameters())) == (not keys)
