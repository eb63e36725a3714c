"""Choices of `build` that depend on several keys."""

from __future__ import annotations

import pytest

from othink_ray.config.load import load
from othink_ray.core.losses import TIS_MODES
from othink_ray.driver.build import temperature, tis_mode


@pytest.mark.parametrize(("dtype", "on_policy"), [("float32", "none"), ("bfloat16", "token")])
def test_auto_corrects_on_policy_answers_only_in_bfloat16(dtype: str, on_policy: str) -> None:
    config = load([f"model.dtype={dtype}"])
    assert tis_mode(config, stale=False) == on_policy
    assert tis_mode(config, stale=True) == "token"


@pytest.mark.parametrize("name", TIS_MODES)
def test_an_explicit_correction_holds_on_and_off_policy(name: str) -> None:
    config = load([f"algo.tis={name}"])
    assert {tis_mode(config, stale=stale) for stale in (False, True)} == {name}


def test_sft_trains_at_temperature_1_and_rl_at_that_of_sampling() -> None:
    assert temperature(load(["rollout.temperature=0.5"])) == 0.5
    assert temperature(load(["rollout.temperature=0.5", "mode=sft"])) == 1.0
