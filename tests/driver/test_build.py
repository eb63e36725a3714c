"""What a configuration is made into, where the choice depends on several keys."""

from __future__ import annotations

import pytest

from othink_ray.config.load import load
from othink_ray.core.losses import CORRECTIONS
from othink_ray.driver.build import correction, temperature


@pytest.mark.parametrize(("dtype", "on_policy"), [("float32", "none"), ("bfloat16", "token")])
def test_by_default_rounding_is_corrected_in_bfloat16_alone(dtype: str, on_policy: str) -> None:
    config = load([f"model.dtype={dtype}"])
    assert correction(config, stale=False) == on_policy
    assert correction(config, stale=True) == "token"


@pytest.mark.parametrize("name", CORRECTIONS)
def test_a_correction_that_is_asked_for_holds_on_policy_and_off(name: str) -> None:
    config = load([f"algo.correction={name}"])
    assert {correction(config, stale=stale) for stale in (False, True)} == {name}


def test_worked_answers_are_learned_at_temperature_1_and_samples_at_their_own() -> None:
    assert temperature(load(["rollout.temperature=0.5"])) == 0.5
    assert temperature(load(["rollout.temperature=0.5", "mode=sft"])) == 1.0
