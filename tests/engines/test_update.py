"""What an update costs and how far it goes: layers run again, pixels held, memory given back, the learning rate."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from othink_ray.config.schema import Config, LoraConfig
from othink_ray.driver import build
from othink_ray.engines import deepspeed_learner
from othink_ray.engines.base import RendezvousInfo, release_cache
from othink_ray.engines.collate import collate_on_host
from othink_ray.families import open_family
from othink_ray.types import Group, Probe
from tests.engines.learner_process import Cost, Outcome, Scenario, run_ranks
from tests.engines.lives import planned
from tests.engines.nearness import distance, moved
from tests.engines.slow_training import TEMPERATURE

STAGES = (1, 2, 3)
RATES = (1e-3, 4e-3)  # neither is the one that the optimizer was made with


@pytest.fixture(scope="module")
def lives(
    small: Config, small_folder: Path, batches: list[list[Group]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Outcome]:
    """One rank each; "once" is a step of one update and one micro-batch, "four" one of four updates of one each."""
    once, four = (
        [planned(batches[0], ranks=1, updates=updates, micro_tokens=10**6)] for updates in (1, len(batches[0]))
    )

    def life(stage: int, **changes: object) -> Scenario:
        learner = replace(small.learner, zero_stage=stage, **changes)  # type: ignore[arg-type]
        return Scenario(learner=learner, steps=once, beta=0.1, temperature=TEMPERATURE)

    adapters = {"lora": LoraConfig(rank=4, alpha=8, targets=("text", "vision"))}
    scenarios = {"untouched": replace(life(1), steps=())}
    for stage in STAGES:
        plain = life(stage)
        scenarios |= {
            f"{stage}, kept": plain,
            f"{stage}, checkpointed": life(stage, gradient_checkpointing=True),
            f"{stage}, adapters, kept": life(stage, **adapters),
            f"{stage}, adapters, checkpointed": life(stage, gradient_checkpointing=True, **adapters),
        }
        sharp = life(stage, adam_eps=1e-12, weight_decay=0.0)
        scenarios |= {f"{stage}, rate {rate}": replace(sharp, rates=[rate]) for rate in RATES}
        apart = life(stage, adam_eps=1e-12, weight_decay=0.0, vision_lr_scale=0.5, projector_lr_scale=4.0)
        scenarios[f"{stage}, rates apart"] = replace(apart, rates=[RATES[0]])
    group = replace(batches[0][0], completions=batches[0][0].completions[:1])
    candidates = np.zeros((len(group.completions[0].token_ids), 1), dtype=np.int64)
    probe = Probe(group=group, candidates=candidates, logprobs=np.zeros(candidates.shape, np.float32))
    several = replace(life(2), steps=four, probes=[probe])
    scenarios |= {"shared GPU": replace(several, shares_gpu=True), "own GPU": several}
    singly = planned(batches[0], ranks=1, updates=1, micro_tokens=1)
    ahead = replace(life(2), steps=[singly] * 4, ahead=True, beta=0.0, with_reference=False)
    scenarios["prepared ahead"] = ahead
    [outcomes] = run_ranks(small.model, small_folder, 1, scenarios, tmp_path_factory.mktemp("update") / "alone")
    return outcomes


def cost_of(lives: dict[str, Outcome], name: str) -> Cost:
    cost = lives[name].cost
    assert cost is not None
    return cost


# ---- gradient checkpointing


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("kind", "passes"), [("", 1), ("adapters, ", 2)])  # adapters off, it is the reference too
def test_checkpointed_layers_run_again_in_backward(
    small: Config, lives: dict[str, Outcome], stage: int, kind: str, passes: int
) -> None:
    tiny = small.model.tiny
    assert tiny is not None
    layers = tiny.vision_layers + tiny.text_layers
    assert cost_of(lives, f"{stage}, {kind}kept").forwards == [passes] * layers
    assert cost_of(lives, f"{stage}, {kind}checkpointed").forwards == [passes + 1] * layers


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", ["", "adapters, "])
def test_checkpointing_keeps_a_fraction_for_backward(lives: dict[str, Outcome], stage: int, kind: str) -> None:
    kept, again = (cost_of(lives, f"{stage}, {kind}{how}").kept_bytes for how in ("kept", "checkpointed"))
    assert again < 0.25 * kept


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", ["", "adapters, "])
def test_checkpointing_changes_nothing_that_is_learned(lives: dict[str, Outcome], stage: int, kind: str) -> None:
    kept, again = (lives[f"{stage}, {kind}{how}"] for how in ("kept", "checkpointed"))
    assert again.stats == kept.stats
    for name, moment in kept.first_moments.items():
        assert np.array_equal(again.first_moments[name], moment), name
    assert distance(again.weights, kept.weights)[0] == 0


# ---- several optimizer steps


def test_the_timeline_says_how_many_tokens_each_pass_reads(
    small: Config, small_folder: Path, batches: list[list[Group]], lives: dict[str, Outcome]
) -> None:
    family = open_family(small.model, str(small_folder))
    [updates] = planned(batches[0], ranks=1, updates=len(batches[0]), micro_tokens=10**6)
    assert cost_of(lives, "own GPU").read == [
        len(collate_on_host(rows, family).token_ids) for micro_batches in updates for rows in micro_batches
    ]


def test_several_updates_hold_the_pixels_of_one_micro_batch(lives: dict[str, Outcome]) -> None:
    assert len(lives["own GPU"].stats) == 1
    assert cost_of(lives, "own GPU").most_pixels <= 2, "the one that is learned, and the next while it is laid out"


def test_what_is_prepared_ahead_waits_with_its_pixels_on_the_host(lives: dict[str, Outcome]) -> None:
    assert lives["prepared ahead"].made == [0, 1, 2, 3], "micro-batches, of four in each step"
    assert cost_of(lives, "prepared ahead").most_pixels <= 2, "the one that is learned, and the next while it is copied"


def test_memory_is_given_back_after_update_and_audit(lives: dict[str, Outcome]) -> None:
    steps = 4
    assert cost_of(lives, "shared GPU").releases == [(steps, 0), (steps, 0)]
    assert cost_of(lives, "own GPU").releases == []


def test_a_cuda_device_is_given_its_cache_back(monkeypatch: pytest.MonkeyPatch) -> None:
    emptied: list[bool] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(True))
    release_cache(torch.device("cpu"))
    assert emptied == []
    release_cache(torch.device("cuda", 0))
    assert emptied == [True]


def test_a_learner_is_told_whether_engines_sleep_on_its_gpu(
    small: Config, small_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[bool] = []
    monkeypatch.setattr(deepspeed_learner, "DeepSpeedLearner", lambda *_, **given: told.append(given["shares_gpu"]))
    place = RendezvousInfo(rank=0, world_size=1, master_address="127.0.0.1", master_port=0)
    for sleep in (True, False):
        config = replace(small, rollout=replace(small.rollout, sleep=sleep))
        build.learner_engine(config, str(small_folder), place, with_reference=False)
    assert told == [True, False]


# ---- the learning rate


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("rate", RATES)
def test_the_first_step_is_as_long_as_its_rate(lives: dict[str, Outcome], stage: int, rate: float) -> None:
    """Adam's first step moves each weight by the rate, whatever its gradient."""
    changes = moved(lives[f"{stage}, rate {rate}"], lives["untouched"])
    assert max(float(np.abs(change).max()) for change in changes.values()) == pytest.approx(rate, rel=1e-3)


@pytest.mark.parametrize("stage", STAGES)
def test_tower_and_projector_step_at_their_share_of_the_rate(lives: dict[str, Outcome], stage: int) -> None:
    changes = moved(lives[f"{stage}, rates apart"], lives["untouched"])
    longest: dict[str, float] = {}
    for name, change in changes.items():
        part = "projector" if ".merger." in name else "vision" if ".visual." in name else "text"
        longest[part] = max(longest.get(part, 0.0), float(np.abs(change).max()))
    expected = {"text": RATES[0], "vision": 0.5 * RATES[0], "projector": 4.0 * RATES[0]}
    assert longest == pytest.approx(expected, rel=1e-3)
