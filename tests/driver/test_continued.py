"""Other settings after a resume are told, and those that would make other weights of adapters are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from othink_ray.config.load import load, to_yaml
from othink_ray.driver.checkpoint import ResumeError, compare_settings


def told(folder: Path, before: list[str], now: list[str]) -> list[str]:
    (folder / "config.yaml").write_text(to_yaml(load(before)))
    said: list[str] = []
    compare_settings(folder / "checkpoints" / "step_3", load(now), said.append)
    return said


def test_the_same_settings_in_another_place_are_nothing_to_tell(tmp_path: Path) -> None:
    assert told(tmp_path, ["run.dir=here"], ["run.dir=there", "run.resume=auto", "wandb.mode=offline"]) == []


def test_other_settings_are_told_with_both_values(tmp_path: Path) -> None:
    [said] = told(tmp_path, ["train.steps=4"], ["train.steps=8", "algo.kl.beta_max=0.5"])
    assert said.startswith("it goes on with other settings than before: ")
    assert "train.steps 4 -> 8" in said and "algo.kl.beta_max 0.1 -> 0.5" in said


def test_adapters_go_on_only_as_what_they_were(tmp_path: Path) -> None:
    adapters = ["learner.lora.rank=4", "learner.lora.alpha=8"]
    assert len(told(tmp_path, adapters, [*adapters, "learner.lr=1e-4"])) == 1
    with pytest.raises(ResumeError, match=r"another learner\.lora\.alpha \(8(\.0)? -> 16(\.0)?\)"):
        told(tmp_path, adapters, [*adapters[:1], "learner.lora.alpha=16"])


def test_a_checkpoint_that_was_taken_elsewhere_has_no_settings_beside_it(tmp_path: Path) -> None:
    compare_settings(tmp_path / "checkpoints" / "step_3", load([]), pytest.fail)
