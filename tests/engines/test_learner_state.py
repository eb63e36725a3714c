"""A learner that was saved goes on as if it had not stopped, on other ranks and under another ZeRO stage too."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from othink_ray.config.schema import Config
from othink_ray.engines.learner_checkpoint import CheckpointWriter, StateError, StoredState
from othink_ray.types import Group
from tests.engines.learner_process import Outcome, run_ranks
from tests.engines.lives import training
from tests.engines.nearness import distance, moved

Lives = dict[str, list[Outcome]]


@pytest.fixture(scope="module")
def at(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the learners save."""
    return tmp_path_factory.mktemp("states")


@pytest.fixture(scope="module")
def lives(small: Config, small_folder: Path, batches: list[list[Group]], at: Path) -> Lives:
    """By ranks and stage; the second step is made by others than those who made the first."""

    def outcomes(ranks: int, name: str, **scenarios: object) -> Lives:
        found = run_ranks(small.model, small_folder, ranks, scenarios, at / name)  # type: ignore[arg-type]
        return {life: [one[life] for one in found] for life in scenarios}

    one, two = training(small, batches, 1), training(small, batches, 2)
    three = training(small, batches, 2, zero_stage=3)
    return (
        outcomes(
            1,
            "first",
            untouched=replace(one, steps=()),
            whole=one,
            half=replace(one, steps=one.steps[:1], save=at / "of_one"),
            nothing=replace(one, steps=(), save=at / "untrained"),
        )
        | outcomes(
            2,
            "second",
            one_to_two=replace(two, steps=two.steps[1:], load=at / "of_one"),
            one_to_stage_3=replace(three, steps=three.steps[1:], load=at / "of_one"),
            untrained_to_stage_3=replace(three, load=at / "untrained"),
            half_of_two=replace(two, steps=two.steps[:1], save=at / "of_two"),
            half_of_stage_3=replace(three, steps=three.steps[:1], save=at / "of_three"),
        )
        | outcomes(
            1,
            "third",
            two_to_one=replace(one, steps=one.steps[1:], load=at / "of_two"),
            stage_3_to_one=replace(one, steps=one.steps[1:], load=at / "of_three"),
            loaded=replace(one, steps=(), load=at / "of_one"),
        )
    )


@pytest.mark.parametrize(
    "name", ["one_to_two", "one_to_stage_3", "untrained_to_stage_3", "two_to_one", "stage_3_to_one"]
)
def test_other_ranks_and_stages_go_on_where_the_first_stopped(lives: Lives, name: str) -> None:
    start, whole = lives["untouched"][0], lives["whole"][0]
    for rank in lives[name]:
        worst, tensor = distance(moved(rank, start), moved(whole, start))
        assert worst < 1e-3, tensor
        assert rank.stats[-1].loss == pytest.approx(whole.stats[-1].loss, rel=1e-4)


@pytest.mark.parametrize("name", ["of_two", "of_three"])
def test_ranks_write_about_as_much_each(lives: Lives, at: Path, name: str) -> None:
    sizes = [(at / name / f"learner_{rank}.safetensors").stat().st_size for rank in range(2)]
    assert min(sizes) > 0.45 * sum(sizes)


def test_a_learner_that_loads_has_the_very_weights_that_were_saved(lives: Lives) -> None:
    assert distance(lives["loaded"][0].weights, lives["half"][0].weights)[0] == 0


def test_without_its_moments_it_would_not_go_on_alike(lives: Lives) -> None:
    """The bound above tells a lost moment from rounding."""
    start, whole = lives["untouched"][0], lives["whole"][0]
    half = moved(lives["half"][0], start)
    assert distance(half, moved(whole, start))[0] > 1e-2


def test_what_was_saved_by_another_model_is_refused_by_name(tmp_path: Path) -> None:
    for rank, name in enumerate(("a.weight", "b.weight")):
        writer = CheckpointWriter(tmp_path, rank, {f"{name}/weight": torch.zeros(2)}, steps=3)
        [(file, digest)] = writer.finish().items()
        assert digest == hashlib.sha256((tmp_path / file).read_bytes()).hexdigest()
    stored = StoredState(tmp_path)
    assert stored.steps == 3
    stored.require({"b.weight": (2,), "a.weight": torch.Size([2])})
    said = r"\(c\.weight\) missing, 1 parameters \(b\.weight\) unexpected, 1 parameters \(a\.weight\) of another shape"
    with pytest.raises(StateError, match=said):
        stored.require({"a.weight": (2, 1), "c.weight": (2,)})


def test_a_full_disk_is_told_when_the_file_is_waited_for(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path / "missing", 0, {"a/weight": torch.zeros(2)}, steps=1)
    with pytest.raises(Exception, match="No such file"):
        writer.finish()
