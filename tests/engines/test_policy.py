"""The learner's network on packed samples against the unmodified network on padded rows."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import cast

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from othink_ray.core.losses import LossInputs, grpo_loss
from othink_ray.engines.policy import Policy
from othink_ray.families.base import Family, ImageTensors
from othink_ray.types import Group, Pack, Prompt
from tests.engines.padded_reference import plain_logprobs
from tests.engines.samples import ask, batch_of, distributions, group_of, picture, row_of
from tests.engines.tolerances import assert_same_gradients, gradients

TEMPERATURE = 0.8

CASES: dict[str, tuple[tuple[Prompt, Sequence[int]], ...]] = {
    "one image": ((ask("a", picture(84, 84, 0)), [5, 5, 5]),),
    "ragged answers": ((ask("a", picture(84, 84, 0)), [1, 7, 3, 12]),),
    "an empty answer": ((ask("a", picture(84, 84, 0)), [3, 0, 4]),),
    "no image": ((ask("a"), [4, 2]),),
    "images of several sizes": (
        (ask("a", picture(84, 84, 0)), [3, 6]),
        (ask("b", picture(300, 40, 1), text="How many?"), [5, 1, 2]),
        (ask("c", picture(56, 168, 2), text="Count the items, please, and be quick about it."), [8]),
    ),
    "two images in one prompt": (
        (ask("a", picture(84, 84, 0), picture(112, 56, 1)), [4, 2]),
        (ask("b", picture(84, 56, 2)), [3, 3]),
    ),
    "no image beside one": (
        (ask("a", text="What is three and three?"), [6, 2]),
        (ask("b", picture(84, 84, 3)), [3, 5]),
        (ask("c"), [1]),
    ),
}


@pytest.fixture
def learner(family: Family, policy: Policy) -> Policy:
    """A separate copy of the network, for tests that read gradients."""
    return Policy(copy.deepcopy(policy.network), family, TEMPERATURE, logit_rows=16)


def groups_of(family: Family, case: str) -> list[Group]:
    return [group_of(family, prompt, lengths, seed) for seed, (prompt, lengths) in enumerate(CASES[case])]


def answer_logprobs(policy: Policy, family: Family, packs: Sequence[Pack], attention: str = "auto") -> Tensor:
    logprobs: Tensor = policy(batch_of(packs, family, attention))[0]
    return logprobs[: sum(int((pack.segments > 0).sum()) for pack in packs)]


@pytest.mark.parametrize("attention", ["grouped", "dense", "blocks"])
@pytest.mark.parametrize("case", CASES)
def test_packed_samples_equal_plain_rows_in_logprobs_and_grads(
    learner: Policy, family: Family, case: str, attention: str
) -> None:
    groups = groups_of(family, case)
    packed = answer_logprobs(learner, family, [row_of(group) for group in groups], attention)
    plain = plain_logprobs(learner, family, groups)
    assert packed.shape == plain.shape
    assert (packed - plain).abs().max() < 1e-5
    direction = torch.randn(packed.shape, generator=torch.Generator().manual_seed(0))
    found = gradients(learner, (packed * direction).sum())
    assert_same_gradients(found, gradients(learner, (plain * direction).sum()), 1e-5)


def test_full_distributions_contain_the_target_logprobs(policy: Policy, family: Family) -> None:
    batch = batch_of([row_of(group) for group in groups_of(family, "images of several sizes")], family)
    with torch.no_grad():
        logprobs, entropy = policy(batch)
        whole = distributions(policy, batch)
    assert torch.allclose(whole.exp().sum(-1), torch.ones(len(whole)), atol=1e-5)
    assert torch.allclose(whole.gather(1, batch.targets[:, None])[:, 0], logprobs, atol=1e-5)
    assert torch.allclose(-(whole.exp() * whole).sum(-1), entropy, atol=1e-4)


# ---- micro-batches


def loss_and_gradient(
    policy: Policy, family: Family, micro_batches: Sequence[Sequence[Pack]]
) -> tuple[float, dict[str, Tensor]]:
    """Return loss and gradients summed over the micro-batches, as in the learner."""
    parts = []
    for packs in micro_batches:
        batch = batch_of(packs, family)
        logprobs, _ = policy(batch)
        reference = logprobs.detach() - 0.3
        value, _ = grpo_loss(
            LossInputs(
                policy_logprobs=logprobs,
                old_logprobs=batch.sampler_logprobs,
                ref_logprobs=reference,
                advantages=batch.advantages,
                loss_weights=batch.loss_weights,
                answers=batch.answers,
                beta=0.1,
                clip_eps=(0.2, 0.2),
                estimator="k3",
            )
        )
        parts.append(value)
    total = torch.stack(parts).sum()
    return float(total.detach()), gradients(policy, total)


def splits(packs: list[Pack]) -> Iterator[list[list[Pack]]]:
    yield [packs[::-1]]
    yield [[pack] for pack in packs]
    yield [packs[:1], packs[1:]]
    yield [packs, []]


def test_loss_and_gradient_do_not_depend_on_micro_batches(learner: Policy, family: Family) -> None:
    groups = [*groups_of(family, "images of several sizes"), *groups_of(family, "no image beside one")]
    packs = [row_of(group, groups_in_step=len(groups)) for group in groups]
    loss, gradient = loss_and_gradient(learner, family, [packs])
    assert abs(loss) > 1e-3
    for micro_batches in splits(packs):
        other_loss, other_gradient = loss_and_gradient(learner, family, micro_batches)
        assert other_loss == pytest.approx(loss, rel=1e-5)
        assert_same_gradients(other_gradient, gradient, 1e-5)


def test_packed_samples_do_not_affect_each_other(policy: Policy, family: Family) -> None:
    short, long = (row_of(group) for group in groups_of(family, "two images in one prompt"))
    longer = row_of(group_of(family, ask("z", picture(84, 84, 9), text="3 " * 60), [40, 40], 9))
    with torch.no_grad():
        alone = answer_logprobs(policy, family, [short, long])
        together = answer_logprobs(policy, family, [short, long, longer])
    assert len(longer) > 2 * len(short)
    assert (together[: len(alone)] - alone).abs().max() < 1e-5


def test_precomputed_features_change_nothing(policy: Policy, family: Family) -> None:
    batch = batch_of([row_of(group) for group in groups_of(family, "two images in one prompt")], family)
    encoded = policy.encoded_images
    with torch.no_grad():
        features = policy(batch, wanted="features")
        assert torch.equal(policy(batch, features=features)[0], policy(batch)[0])
    assert policy.encoded_images - encoded == 2 * 3


class PackingProbe:
    """A family whose `image_features` returns its `packed` argument."""

    def image_features(self, network: object, images: ImageTensors, *, packed: bool) -> bool:
        return packed


def test_images_are_packed_for_flex_attention_on_a_gpu(policy: Policy, family: Family) -> None:
    probe = Policy(policy.network, cast(Family, PackingProbe()), TEMPERATURE, logit_rows=16)
    packs = [row_of(group) for group in groups_of(family, "images of several sizes")]
    flex, dense = (batch_of(packs, family, name) for name in ("flex", "dense"))
    assert not probe.image_features(flex)
    with FakeTensorMode():
        on_gpu = replace(flex.images, pixels=torch.empty(flex.images.pixels.shape, device="cuda"))
    assert probe.image_features(replace(flex, images=on_gpu))
    assert not probe.image_features(replace(dense, images=on_gpu))


def test_a_batch_without_images_still_runs_the_vision_tower(learner: Policy, family: Family) -> None:
    packs = [row_of(group_of(family, ask(name), lengths, 3)) for name, lengths in (("a", [4, 2]), ("b", [5]))]
    batch = batch_of(packs, family)
    assert len(batch.images.grids) == 1
    assert (batch.loss_weights != 0).sum() == sum(int((pack.loss_weights != 0).sum()) for pack in packs)
    _, gradient = loss_and_gradient(learner, family, [packs])
    vision = [value for name, value in gradient.items() if ".visual." in name]
    assert vision
    assert not any(value.any() for value in vision)
    assert all(p.grad is not None for name, p in learner.network.named_parameters() if ".visual." in name)
    plain = plain_logprobs(learner, family, [group_of(family, ask("a"), [4, 2], 3)])
    assert (answer_logprobs(learner, family, packs[:1]) - plain).abs().max() < 1e-5


def test_an_empty_micro_batch_has_no_weight(learner: Policy, family: Family) -> None:
    loss, gradient = loss_and_gradient(learner, family, [[]])
    assert loss == 0
    assert not any(value.any() for value in gradient.values())


def test_a_wrong_number_of_image_tokens_is_refused_by_name(family: Family) -> None:
    group = group_of(family, ask("q17", picture(84, 84, 0)), [3, 2], 0)
    ids = group.prompt_token_ids
    first = int((ids == family.image_token_id).argmax())
    shorter = replace(group, prompt_token_ids=ids[[index for index in range(len(ids)) if index != first]])
    with pytest.raises(ValueError, match=r"q17.* to 8 tokens.* to 9: .*preprocessor_config"):
        batch_of([row_of(shorter)], family)


def test_vision_tokens_have_no_probability_at_any_position(policy: Policy, family: Family) -> None:
    batch = batch_of([row_of(group_of(family, ask("a", picture(84, 84, 0)), [3], 0))], family)
    with torch.no_grad():
        whole = distributions(policy, batch)
    assert len(set(family.banned_token_ids)) == 5
    assert whole[:, list(family.banned_token_ids)].max() < -90
    assert whole[:, family.eos_token_id].min() > -20
