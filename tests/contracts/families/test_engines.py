"""The contract of every family with real vLLM: prompts, pixels, weights and distributions."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

import pytest
import torch

from othink_ray.config.schema import Config, ModelConfig
from othink_ray.engines.hf_rollout import HFRollout
from othink_ray.engines.policy import Policy
from othink_ray.engines.prefetch import pixel_digest, pixels_as
from othink_ray.families.base import Family
from othink_ray.types import PixelDigest
from othink_ray.weights import Tolerance, compare, repeated, to_buckets
from tests.contracts.family_engine import SAMPLING, Lived, live
from tests.engines.samples import (
    MIXED,
    batch_of,
    distributions,
    learner_gap,
    row_of,
    sent_weights,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def lives(
    config: Config,
    models: dict[str, ModelConfig],
    policies: dict[str, Policy],
    trained: dict[str, Policy],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[dict[str, Future[Lived]]]:
    """vLLM engines opened on a saved folder and then pushed the trained weights, two at a time."""
    with ProcessPoolExecutor(2, mp_context=get_context("spawn"), max_tasks_per_child=1) as processes:
        futures = {}
        for name, policy in policies.items():
            saved = tmp_path_factory.mktemp("saved")
            policy.family.save(saved, policy.network, sent_weights(policy.network))
            weights = list(to_buckets(sent_weights(trained[name].network), bucket_bytes=1))
            futures[name] = processes.submit(live, models[name], config.rollout, str(saved), MIXED, weights)
        yield futures


@pytest.fixture
def lived(name: str, lives: dict[str, Future[Lived]]) -> Lived:
    return lives[name].result()


def test_the_engine_expands_prompts_like_the_family(family: Family, lived: Lived) -> None:
    assert {group.prompt.id for group in lived.opened} == {prompt.id for prompt in MIXED}
    for group in lived.opened:
        counts = family.image_token_counts(group.prompt.images)
        assert group.prompt_token_ids.tolist() == family.expand(family.prompt_token_ids(group.prompt), counts)
    assert sum(group.image_encodes for group in lived.opened) == sum(len(prompt.images) for prompt in MIXED)


def test_an_engine_opened_on_a_saved_folder_matches_the_learner(policy: Policy, lived: Lived) -> None:
    gaps = [learner_gap(policy, policy.family, group) for group in lived.opened]
    assert max(float(gap.max()) for gap in gaps) < 1e-4


def test_digests_in_the_engine_match_the_weights_sent(policy: Policy, lived: Lived) -> None:
    assert lived.wrong == {}
    assert set(lived.wrong_by_a_bit) == {name for name, _ in sent_weights(policy.network)}


def test_the_gap_after_the_first_push_is_within_tolerance(name: str, trained: dict[str, Policy], lived: Lived) -> None:
    policy = trained[name]
    batch = batch_of([row_of(probe.group) for probe in lived.probes], policy.family)
    with torch.no_grad():
        all_logprobs = distributions(policy, batch)
    sizes = [len(probe.candidates) for probe in lived.probes]
    expected = [
        rows.gather(1, torch.from_numpy(probe.candidates)).numpy()
        for rows, probe in zip(all_logprobs[: sum(sizes)].split(sizes), lived.probes, strict=True)
    ]
    layers = len(policy.family.layers(policy.network))
    audit = Tolerance("float32", layers).require(compare(lived.probes, repeated(lived.probes, expected), 1))
    assert 0 < audit.gap_mean < audit.tolerance / 2


def test_the_engine_and_the_learner_see_identical_pixels(family: Family, lived: Lived) -> None:
    for prompt, probe in zip(MIXED, lived.probes, strict=True):
        found = probe.pixels
        if not prompt.images:
            assert found == PixelDigest()
            continue
        images = family.encode_images(prompt.images)
        assert found == pixel_digest(pixels_as(family, images, found.dtype))
        changed = replace(images, pixels=images.pixels.clone())
        changed.pixels[-1].view(-1)[-1] += 1 / 255 / family.processor.image_processor.image_std[-1]
        assert found != pixel_digest(pixels_as(family, changed, found.dtype))


def test_a_push_changes_every_weight_element_exactly_once(policy: Policy, lived: Lived) -> None:
    assert lived.moved == {name: weight.numel() for name, weight in sent_weights(policy.network)}
    assert {name: kept for name, kept in lived.kept.items() if kept} == {}


def test_after_a_push_the_engine_matches_the_trained_policy(
    name: str, policy: Policy, trained: dict[str, Policy], lived: Lived
) -> None:
    gaps = [learner_gap(trained[name], policy.family, group) for group in lived.pushed]
    assert max(float(gap.max()) for gap in gaps) < 1e-4
    stale = [learner_gap(policy, policy.family, group) for group in lived.pushed]
    assert min(float(gap.max()) for gap in stale) > 0.01


def test_the_transformers_engine_matches_the_learner(
    name: str, policy: Policy, config: Config, models: dict[str, ModelConfig]
) -> None:
    engine = HFRollout(config.rollout, models[name], policy.family)
    gaps = [learner_gap(policy, policy.family, group) for group in engine.generate(MIXED, SAMPLING)]
    assert max(float(gap.max()) for gap in gaps) < 1e-4
