"""The cache folder and the warm start of base models."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import pytest

from othink_ray.config.load import load
from othink_ray.config.model_rules import base_model_folder
from othink_ray.config.schema import Config
from othink_ray.driver.build import temperature
from othink_ray.driver.console import Console
from othink_ray.driver.warm_start import OpenedSFT, warm_started_model
from othink_ray.families import smol


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
def test_settings_that_shape_the_base_model_change_its_folder(override: str) -> None:
    assert base_model_folder(load([override])) != base_model_folder(load([]))


@pytest.mark.parametrize(
    "override",
    [
        *("train.seed=5", "algo=grpo", "learner.world_size=2", "learner.lr=1e-3", "rollout.num_actors=2"),
        *("learner.freeze=vision", "learner.lora.rank=8", "data.blind=true", "data.test.size=7"),
    ],
)
def test_runs_that_differ_only_in_training_share_a_base_model(override: str) -> None:
    assert base_model_folder(load([override])) == base_model_folder(load([]))


class _Opened(Exception):
    """Stops the run when it opens the SFT workers."""


def _first_sft_config(config: Config) -> Config:
    """Return the configuration of the first warm start."""
    requested: list[Config] = []

    def open_sft(config: Config, folder: Path, say: Callable[[str], None]) -> AbstractContextManager[OpenedSFT]:
        requested.append(config)
        raise _Opened

    with Console() as console, pytest.raises(_Opened):
        warm_started_model(config, console, open_sft)
    [first] = requested
    return first


def test_the_warm_start_trains_all_weights_at_temperature_1(tmp_path: Path) -> None:
    first = _first_sft_config(
        load([f"run.cache_dir={tmp_path}", "learner.lora.rank=8", "learner.freeze=vision", "rollout.temperature=0.5"])
    )
    assert (first.learner.freeze, first.learner.lora.rank, temperature(first)) == ("none", 0, 1.0)


def test_the_vision_tower_is_trained_before_the_smol_model(tmp_path: Path) -> None:
    first = _first_sft_config(load([f"run.cache_dir={tmp_path}", "model=smol", "data=easy_vqa"]))
    assert (first.model.name, first.model.smol, first.sft.reasoning) == ("smol-eyes", None, False)


@pytest.mark.parametrize("data", ["counting", "easy_vqa"])
def test_the_smol_model_is_warm_started_on_the_runs_data(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load([f"run.cache_dir={tmp_path}", "model=smol", f"data={data}"])
    tower = base_model_folder(replace(config, model=replace(config.model, name="smol-eyes", smol=None)))
    tower.mkdir()
    (tower / "config.json").touch()  # cached by an earlier run
    monkeypatch.setattr(smol, "build_smol", lambda *_: None)
    first = _first_sft_config(config)
    assert (first.model.name, first.data.train, first.sft.reasoning) == ("smol", config.data.train, True)
