"""The kept base model belongs to exactly one recipe."""

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
from othink_ray.driver.warm_start import Classroom, warm_started
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
def test_whatever_shapes_the_base_model_gives_it_another_folder(override: str) -> None:
    assert base_model_folder(load([override])) != base_model_folder(load([]))


@pytest.mark.parametrize(
    "override",
    [
        *("train.seed=5", "algo=grpo", "learner.world_size=2", "learner.lr=1e-3", "rollout.num_actors=2"),
        *("learner.freeze=vision", "learner.lora.rank=8", "data.blind=true", "data.test.size=7"),
    ],
)
def test_runs_that_differ_only_in_training_share_it(override: str) -> None:
    assert base_model_folder(load([override])) == base_model_folder(load([]))


class _Opened(Exception):
    pass


def _first_room(config: Config) -> Config:
    """With what the first lessons are given."""
    requested: list[Config] = []

    def open_classroom(config: Config, folder: Path, say: Callable[[str], None]) -> AbstractContextManager[Classroom]:
        requested.append(config)
        raise _Opened

    with Console() as console, pytest.raises(_Opened):
        warm_started(config, console, open_classroom)
    [room] = requested
    return room


def test_the_base_model_is_taught_with_all_of_its_weights_at_temperature_1(tmp_path: Path) -> None:
    room = _first_room(
        load([f"run.cache_dir={tmp_path}", "learner.lora.rank=8", "learner.freeze=vision", "rollout.temperature=0.5"])
    )
    assert (room.learner.freeze, room.learner.lora.rank, temperature(room)) == ("none", 0, 1.0)


def test_the_pretrained_model_is_made_after_its_eyes_have_learned_in_a_small_one(tmp_path: Path) -> None:
    room = _first_room(load([f"run.cache_dir={tmp_path}", "model=smol", "data=easy_vqa"]))
    assert (room.model.name, room.model.smol, room.sft.reasoning) == ("smol-eyes", None, False)


@pytest.mark.parametrize("data", ["counting", "easy_vqa"])
def test_the_pretrained_model_is_taught_by_the_questions_of_the_run(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load([f"run.cache_dir={tmp_path}", "model=smol", f"data={data}"])
    eyes = base_model_folder(replace(config, model=replace(config.model, name="smol-eyes", smol=None)))
    eyes.mkdir()
    (eyes / "config.json").touch()  # they were made before
    monkeypatch.setattr(smol, "build_smol", lambda *_: None)
    room = _first_room(config)
    assert (room.model.name, room.data.train, room.sft.reasoning) == ("smol", config.data.train, True)
