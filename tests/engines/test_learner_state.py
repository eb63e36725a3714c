"""A resumed learner equals an uninterrupted one, also on other ranks and at another ZeRO stage."""

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
from tests.engines.scenarios import training
from tests.engines.tolerances import distance, moved

pytestmark = pytest.mark.slow

Outcomes = dict[str, list[Outcome]]


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the saved checkpoints."""
    return tmp_path_factory.mktemp("states")


@pytest.fixture(scope="module")
def outcomes(small: Config, small_folder: Path, batches: list[list[Group]], scratch: Path) -> Outcomes:
    """Outcomes of each scenario, by rank; the second step runs on other ranks or another stage than the first."""

    def run(ranks: int, name: str, **scenarios: object) -> Outcomes:
        found = run_ranks(small.model, small_folder, ranks, scenarios, scratch / name)  # type: ignore[arg-type]
        return {key: [rank[key] for rank in found] for key in scenarios}

    one, two = training(small, batches, 1), training(small, batches, 2)
    three = training(small, batches, 2, zero_stage=3)
    return (
        run(
            1,
            "first",
            untouched=replace(one, steps=()),
            whole=one,
            half=replace(one, steps=one.steps[:1], save=scratch / "of_one"),
            nothing=replace(one, steps=(), save=scratch / "untrained"),
        )
        | run(
            2,
            "second",
            one_to_two=replace(two, steps=two.steps[1:], load=scratch / "of_one"),
            one_to_stage_3=replace(three, steps=three.steps[1:], load=scratch / "of_one"),
            untrained_to_stage_3=replace(three, load=scratch / "untrained"),
            half_of_two=replace(two, steps=two.steps[:1], save=scratch / "of_two"),
            half_of_stage_3=replace(three, steps=three.steps[:1], save=scratch / "of_three"),
        )
        | run(
            1,
            "third",
            two_to_one=replace(one, steps=one.steps[1:], load=scratch / "of_two"),
            stage_3_to_one=replace(one, steps=one.steps[1:], load=scratch / "of_three"),
            loaded=replace(one, steps=(), load=scratch / "of_one"),
        )
    )


@pytest.mark.parametrize(
    "name", ["one_to_two", "one_to_stage_3", "untrained_to_stage_3", "two_to_one", "stage_3_to_one"]
)
def test_a_checkpoint_resumes_on_other_ranks_and_stages(outcomes: Outcomes, name: str) -> None:
    start, whole = outcomes["untouched"][0], outcomes["whole"][0]
    for rank in outcomes[name]:
        worst, tensor = distance(moved(rank, start), moved(whole, start))
        assert worst < 1e-3, tensor
        assert rank.stats[-1].loss == pytest.approx(whole.stats[-1].loss, rel=1e-4)


@pytest.mark.parametrize("name", ["of_two", "of_three"])
def test_ranks_write_shards_of_similar_size(outcomes: Outcomes, scratch: Path, name: str) -> None:
    sizes = [(scratch / name / f"learner_{rank}.safetensors").stat().st_size for rank in range(2)]
    assert min(sizes) > 0.45 * sum(sizes)


def test_loaded_weights_are_bit_identical_to_the_saved(outcomes: Outcomes) -> None:
    assert distance(outcomes["loaded"][0].weights, outcomes["half"][0].weights)[0] == 0


def test_losing_the_moments_would_exceed_the_tolerance(outcomes: Outcomes) -> None:
    """The tolerance of the test above separates lost moments from rounding."""
    start, whole = outcomes["untouched"][0], outcomes["whole"][0]
    half = moved(outcomes["half"][0], start)
    assert distance(half, moved(whole, start))[0] > 1e-2


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    for rank, name in enumerate(("a.weight", "b.weight")):
        writer = CheckpointWriter(tmp_path, rank, {f"{name}/weight": torch.zeros(2)}, steps=3)
        [(file, digest)] = writer.finish().items()
        assert digest == hashlib.sha256((tmp_path / file).read_bytes()).hexdigest()
    stored = StoredState(tmp_path)
    assert stored.steps == 3
    stored.require({"b.weight": (2,), "a.weight": torch.Size([2])})
    message = (
        r"\(c\.weight\) missing, 1 parameters \(b\.weight\) unexpected, 1 parameters \(a\.weight\) of another shape"
    )
    with pytest.raises(StateError, match=message):
        stored.require({"a.weight": (2, 1), "c.weight": (2,)})


def test_a_failed_write_raises_when_it_is_waited_for(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path / "missing", 0, {"a/weight": torch.zeros(2)}, steps=1)
    with pytest.raises(Exception, match="No such file"):
        writer.finish()
