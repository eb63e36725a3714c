"""The contract of a push on both rollout engines: all new weights are in use, or the engine refuses to generate."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from othink_ray.engines.base import RolloutEngine, Sampling, UnfinishedPush
from othink_ray.engines.policy import Policy
from othink_ray.families.base import Family
from othink_ray.types import Group
from othink_ray.weights import digests
from tests.engines.samples import (
    MIXED,
    give,
    learner_gap,
    sent_weights,
)

WARM = Sampling(answers=4, max_tokens=8, temperature=1.0, seed=7)


def test_new_weights_change_answers_and_old_ones_restore_them(
    engine: RolloutEngine, policy: Policy, taught: Policy
) -> None:
    before = list(engine.generate(MIXED, WARM))
    give(engine, sent_weights(taught.network), 5)
    changed = list(engine.generate(MIXED, WARM))
    assert (engine.version, {group.version for group in changed}) == (5, {5})
    give(engine, sent_weights(policy.network), 6)
    after = list(engine.generate(MIXED, WARM))
    assert {group.version for group in after} == {6}

    def seen(groups: Sequence[Group]) -> dict[str, list[list[float]]]:
        return {
            g.prompt.id: [[*c.token_ids.tolist(), *c.sampler_logprobs.tolist()] for c in g.completions] for g in groups
        }

    assert all(seen(before)[prompt.id] != seen(changed)[prompt.id] for prompt in MIXED)
    for name, rows in seen(before).items():
        assert [pytest.approx(row, abs=1e-5) for row in rows] == seen(after)[name]


@pytest.mark.parametrize("tower", ["visual", "language_model"])
def test_new_weights_of_either_tower_reach_a_cached_prompt(
    engine: RolloutEngine, family: Family, policy: Policy, tower: str
) -> None:
    moved = copy.deepcopy(policy)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in moved.network.named_parameters():
            if f".{tower}." in name:
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    list(engine.generate(MIXED, WARM))
    give(engine, sent_weights(moved.network), 1)
    for group in engine.generate(MIXED, WARM):
        assert learner_gap(moved, family, group).mean() < 1e-4


@pytest.mark.parametrize("size", [1, 7])
def test_weights_may_come_in_buckets_of_any_size(
    engine: RolloutEngine, family: Family, taught: Policy, size: int
) -> None:
    """Parts of a matrix that the engine fuses arrive in different buckets."""
    weights = sent_weights(taught.network)
    buckets = [weights[start : start + size] for start in range(0, len(weights), size)]
    engine.begin_push()
    for bucket in buckets:
        engine.load_weights(iter(bucket))
    engine.finish_push(3, buckets=len(buckets))
    assert engine.version == 3
    for group in engine.generate(MIXED, WARM):
        assert learner_gap(taught, family, group).mean() < 1e-4


@pytest.mark.parametrize("part", [".visual.", ".q_proj.", "embed_tokens"])
def test_weights_that_are_not_pushed_keep_their_values(
    engine: RolloutEngine, family: Family, policy: Policy, taught: Policy, part: str
) -> None:
    mixed = copy.deepcopy(taught)
    pushed = [(name, weight) for name, weight in sent_weights(policy.network) if part in name]
    assert pushed
    with torch.no_grad():
        for name, weight in pushed:
            mixed.network.get_parameter(name).copy_(weight)
    give(engine, sent_weights(taught.network), 1)
    give(engine, pushed, 2)
    for group in engine.generate(MIXED, WARM):
        assert learner_gap(mixed, family, group).mean() < 1e-4


def test_half_a_push_refuses_to_generate_until_a_full_one(
    engine: RolloutEngine, family: Family, taught: Policy
) -> None:
    weights = sent_weights(taught.network)
    half = len(weights) // 2
    engine.begin_push()
    engine.load_weights(weights[:half])
    for _ in range(2):
        with pytest.raises(UnfinishedPush, match="parts of two policies"):
            list(engine.generate(MIXED, WARM))
        with pytest.raises(UnfinishedPush, match="parts of two policies"):
            engine.probe(MIXED, replace(WARM, answers=1), 3)
        with pytest.raises(UnfinishedPush, match="only 1 of the 2 buckets of weights version 1 arrived"):
            engine.finish_push(1, buckets=2)
    give(engine, weights, 2)
    assert {group.version for group in engine.generate(MIXED, WARM)} == {2}
    assert all(learner_gap(taught, family, group).mean() < 1e-4 for group in engine.generate(MIXED, WARM))


def test_a_bucket_that_fails_to_load_leaves_a_push_unfinished(
    engine: RolloutEngine, policy: Policy, taught: Policy
) -> None:
    [(name, weight), *_] = sent_weights(taught.network)
    engine.begin_push()
    with pytest.raises((AssertionError, RuntimeError)):
        engine.load_weights([(name, weight[:-1])])
    with pytest.raises((ValueError, KeyError)):
        engine.load_weights([("no.such.weight", weight)])
    with pytest.raises(UnfinishedPush):
        engine.finish_push(1, buckets=2)
    with pytest.raises(UnfinishedPush):
        list(engine.generate(MIXED, WARM))
    give(engine, sent_weights(policy.network), 2)


def test_missing_weights_fail_the_digest_check(engine: RolloutEngine, policy: Policy, taught: Policy) -> None:
    weights = sent_weights(taught.network)
    expected = digests(weights)
    older = sent_weights(policy.network)
    assert engine.check_weights(digests(older), complete=True) == {}
    give(engine, weights[:-1], 1)  # the last weight is missing
    wrong = {weights[-1][0]: "differs from what the learner sent"}
    assert engine.check_weights(expected, complete=True) == wrong
    give(engine, weights, 2)
    assert engine.check_weights(expected, complete=True) == {}
    part = dict(list(expected.items())[3:5])
    assert engine.check_weights(part, complete=False) == {}


def test_weights_known_to_only_one_side_are_named(engine: RolloutEngine, policy: Policy) -> None:
    expected = digests(sent_weights(policy.network))
    assert engine.check_weights(expected, complete=True) == {}
    [(first, digest), *others] = expected.items()
    assert list(engine.check_weights(dict(others), complete=True).values()) == [
        "is not reached by any weight of the learner"
    ]
    longer = replace(digest, shape=(digest.shape[0] + 1, *digest.shape[1:]))
    found = engine.check_weights({**expected, first: longer}, complete=False)
    assert found == {first: "is not in the engine, or not whole"}


def test_each_image_is_encoded_once_for_all_answers(engine: RolloutEngine) -> None:
    groups = list(engine.generate(MIXED, WARM))
    assert sum(group.image_encodes for group in groups) == sum(len(prompt.images) for prompt in MIXED) == 5
