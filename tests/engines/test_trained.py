"""Whether a push brings every weight."""

from __future__ import annotations

import pytest

from othink_ray.config.load import load
from othink_ray.engines.trained import trains_all


@pytest.mark.parametrize(
    ("keys", "all_of_it"),
    [
        ([], True),
        (["learner.lora.rank=8"], False),
        (["learner.freeze=vision"], False),
        (["learner.freeze=vision", "learner.lora.rank=8"], False),
    ],
)
def test_all_is_trained_without_adapters_and_frozen_parts(keys: list[str], all_of_it: bool) -> None:
    assert trains_all(load(keys).learner) == all_of_it
