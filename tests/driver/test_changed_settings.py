"""Changed settings are logged on resume; changes that would invalidate the adapters are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from othink_ray.config.load import load, to_yaml
from othink_ray.driver.checkpoint import ResumeError, compare_settings


def logged(folder: Path, before: list[str], now: list[str]) -> list[str]:
    (folder / "config.yaml").write_text(to_yaml(load(before)))
    lines: list[str] = []
    compare_settings(folder / "checkpoints" / "step_3", load(now), lines.append)
    return lines


def test_a_changed_location_is_not_logged(tmp_path: Path) -> None:
    assert logged(tmp_path, ["run.dir=here"], ["run.dir=there", "run.resume=auto", "wandb.mode=offline"]) == []


def test_changed_settings_are_logged_with_both_values(tmp_path: Path) -> None:
    [line] = logged(tmp_path, ["train.steps=4"], ["train.steps=8", "algo.kl.beta_max=0.5"])
    assert line.startswith("resuming with changed settings: ")
    assert "train.steps 4 -> 8" in line and "algo.kl.beta_max 0.1 -> 0.5" in line


def test_resuming_adapters_with_another_alpha_is_refused(tmp_path: Path) -> None:
    adapters = ["learner.lora.rank=4", "learner.lora.alpha=8"]
    assert len(logged(tmp_path, adapters, [*adapters, "learner.lr=1e-4"])) == 1
    with pytest.raises(ResumeError, match=r"another learner\.lora\.alpha \(8(\.0)? -> 16(\.0)?\)"):
        logged(tmp_path, adapters, [*adapters[:1], "learner.lora.alpha=16"])


def test_a_checkpoint_without_a_config_beside_it_is_accepted(tmp_path: Path) -> None:
    compare_settings(tmp_path / "checkpoints" / "step_3", load([]), pytest.fail)
