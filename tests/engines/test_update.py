"""Cost and size of an update: recomputed layers, pixels on the device, released memory, the learning rate."""

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
from tests.engines.reference_training import TEMPERATURE
from tests.engines.scenarios import planned
from tests.engines.tolerances import distance, moved

pytestmark = pytest.mark.slow

STAGES = (1, 2, 3)
RATES = (1e-3, 4e-3)  # both differ from the rate with which the optimizer was created


@pytest.fixture(scope="module")
def outcomes(
    small: Config, small_folder: Path, batches: list[list[Group]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Outcome]:
    """Outcomes on one rank; `once` is a step of one update with one micro-batch, `four` of four such updates."""
    once, four = (
        [planned(batches[0], ranks=1, updates=updates, micro_tokens=10**6)] for updates in (1, len(batches[0]))
    )

    def scenario(stage: int, **changes: object) -> Scenario:
        learner = replace(small.learner, zero_stage=stage, **changes)  # type: ignore[arg-type]
        return Scenario(learner=learner, steps=once, beta=0.1, temperature=TEMPERATURE)

    adapters = {"lora": LoraConfig(rank=4, alpha=8, targets=("text", "vision"))}
    scenarios = {"untouched": replace(scenario(1), steps=())}
    for stage in STAGES:
        plain = scenario(stage)
        scenarios |= {
            f"{stage}, kept": plain,
            f"{stage}, checkpointed": scenario(stage, gradient_checkpointing=True),
            f"{stage}, adapters, kept": scenario(stage, **adapters),
            f"{stage}, adapters, checkpointed": scenario(stage, gradient_checkpointing=True, **adapters),
        }
        sharp = scenario(stage, adam_eps=1e-12, weight_decay=0.0)
        scenarios |= {f"{stage}, rate {rate}": replace(sharp, rates=[rate]) for rate in RATES}
        apart = scenario(stage, adam_eps=1e-12, weight_decay=0.0, vision_lr_scale=0.5, projector_lr_scale=4.0)
        scenarios[f"{stage}, rates apart"] = replace(apart, rates=[RATES[0]])
    group = replace(batches[0][0], completions=batches[0][0].completions[:1])
    candidates = np.zeros((len(group.completions[0].token_ids), 1), dtype=np.int64)
    probe = Probe(group=group, candidates=candidates, logprobs=np.zeros(candidates.shape, np.float32))
    several = replace(scenario(2), steps=four, probes=[probe])
    scenarios |= {"shared GPU": replace(several, shares_gpu=True), "separate GPU": several}
    singly = planned(batches[0], ranks=1, updates=1, micro_tokens=1)
    prefetch = replace(scenario(2), steps=[singly] * 4, prefetch=True, beta=0.0, with_reference=False)
    scenarios["prefetch"] = prefetch
    [outcomes] = run_ranks(small.model, small_folder, 1, scenarios, tmp_path_factory.mktemp("update") / "alone")
    return outcomes


def cost_of(outcomes: dict[str, Outcome], name: str) -> Cost:
    cost = outcomes[name].cost
    assert cost is not None
    return cost


# ---- gradient checkpointing


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("kind", "passes"), [("", 1), ("adapters, ", 2)])  # without its adapters it is the reference
def test_checkpointed_layers_are_recomputed_in_backward(
    small: Config, outcomes: dict[str, Outcome], stage: int, kind: str, passes: int
) -> None:
    tiny = small.model.tiny
    assert tiny is not None
    layers = tiny.vision_layers + tiny.text_layers
    assert cost_of(outcomes, f"{stage}, {kind}kept").forwards == [passes] * layers
    assert cost_of(outcomes, f"{stage}, {kind}checkpointed").forwards == [passes + 1] * layers


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", ["", "adapters, "])
def test_checkpointing_saves_a_fraction_for_backward(outcomes: dict[str, Outcome], stage: int, kind: str) -> None:
    kept, again = (cost_of(outcomes, f"{stage}, {kind}{how}").saved_bytes for how in ("kept", "checkpointed"))
    assert again < 0.25 * kept


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", ["", "adapters, "])
def test_checkpointing_does_not_change_an_update(outcomes: dict[str, Outcome], stage: int, kind: str) -> None:
    kept, again = (outcomes[f"{stage}, {kind}{how}"] for how in ("kept", "checkpointed"))
    assert again.stats == kept.stats
    for name, moment in kept.first_moments.items():
        assert np.array_equal(again.first_moments[name], moment), name
    assert distance(again.weights, kept.weights)[0] == 0


# ---- several optimizer steps


def test_the_timeline_records_the_tokens_of_each_pass(
    small: Config, small_folder: Path, batches: list[list[Group]], outcomes: dict[str, Outcome]
) -> None:
    family = open_family(small.model, str(small_folder))
    [updates] = planned(batches[0], ranks=1, updates=len(batches[0]), micro_tokens=10**6)
    assert cost_of(outcomes, "separate GPU").read == [
        len(collate_on_host(packs, family).token_ids) for micro_batches in updates for packs in micro_batches
    ]


def test_updates_hold_the_pixels_of_one_micro_batch(outcomes: dict[str, Outcome]) -> None:
    assert len(outcomes["separate GPU"].stats) == 1
    assert cost_of(outcomes, "separate GPU").peak_pixels <= 2, "the current one, and the next during collation"


def test_prefetched_micro_batches_keep_pixels_on_the_host(outcomes: dict[str, Outcome]) -> None:
    assert outcomes["prefetch"].prefetched == [0, 1, 2, 3], "micro-batches, of four per step"
    assert cost_of(outcomes, "prefetch").peak_pixels <= 2, "the current one, and the next while it is copied"


def test_memory_is_released_after_update_and_audit(outcomes: dict[str, Outcome]) -> None:
    steps = 4
    assert cost_of(outcomes, "shared GPU").releases == [(steps, 0), (steps, 0)]
    assert cost_of(outcomes, "separate GPU").releases == []


def test_only_a_cuda_device_has_its_cache_released(monkeypatch: pytest.MonkeyPatch) -> None:
    emptied: list[bool] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(True))
    release_cache(torch.device("cpu"))
    assert emptied == []
    release_cache(torch.device("cuda", 0))
    assert emptied == [True]


def test_rollout_sleep_sets_the_learners_shares_gpu(
    small: Config, small_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares_gpu: list[bool] = []
    monkeypatch.setattr(
        deepspeed_learner, "DeepSpeedLearner", lambda *_, **settings: shares_gpu.append(settings["shares_gpu"])
    )
    rendezvous = RendezvousInfo(rank=0, world_size=1, master_address="127.0.0.1", master_port=0)
    for sleep in (True, False):
        config = replace(small, rollout=replace(small.rollout, sleep=sleep))
        build.learner_engine(config, str(small_folder), rendezvous, with_reference=False)
    assert shares_gpu == [True, False]


# ---- the learning rate


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("rate", RATES)
def test_the_first_step_has_the_size_of_its_rate(outcomes: dict[str, Outcome], stage: int, rate: float) -> None:
    """Adam's first step moves each weight by the rate, whatever its gradient."""
    changes = moved(outcomes[f"{stage}, rate {rate}"], outcomes["untouched"])
    assert max(float(np.abs(change).max()) for change in changes.values()) == pytest.approx(rate, rel=1e-3)


@pytest.mark.parametrize("stage", STAGES)
def test_tower_and_projector_use_their_scaled_rates(outcomes: dict[str, Outcome], stage: int) -> None:
    changes = moved(outcomes[f"{stage}, rates apart"], outcomes["untouched"])
    longest: dict[str, float] = {}
    for name, change in changes.items():
        part = "projector" if ".merger." in name else "vision" if ".visual." in name else "text"
        longest[part] = max(longest.get(part, 0.0), float(np.abs(change).max()))
    expected = {"text": RATES[0], "vision": 0.5 * RATES[0], "projector": 4.0 * RATES[0]}
    assert longest == pytest.approx(expected, rel=1e-3)
