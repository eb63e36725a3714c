"""Truncated and masked importance sampling against the slow reference, and what they must not change."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch

from othink_ray.core.advantages import group_advantages
from othink_ray.core.losses import LOSSES, TIS_MODES, LossInputs, RatioTerms, importance_weights
from tests.reference import importance as slow
from tests.reference.grpo_d import Answer
from tests.reference.variants import Variant

BETA = 0.05
BOUNDS = LOW, CAP = 0.8, 1.2
VARIANTS = {
    "grpo": Variant("group_std", "grpo", "answer_mean", "k3", 0.2, 0.2),
    "gspo": Variant("group_std", "gspo", "answer_mean", "k2", 0.05, 0.08),
}
ACTIVE_MODES = tuple(name for name in TIS_MODES if name != "none")


@dataclass
class Tokens:
    """Answer tokens of a step, flat (N,)."""

    policy: torch.Tensor
    old: torch.Tensor
    sampler: torch.Tensor
    ref: torch.Tensor
    advantages: torch.Tensor
    weights: torch.Tensor
    answers: torch.Tensor

    def __getitem__(self, rows: torch.Tensor) -> Tokens:
        return Tokens(*(value[rows] for value in vars(self).values()))

    def importance(self, name: str) -> tuple[torch.Tensor, RatioTerms]:
        return importance_weights(name, self.old, self.sampler, self.weights, self.answers, bounds=BOUNDS)

    def loss(self, variant: Variant, name: str) -> torch.Tensor:
        """Compute the loss as the learner does."""
        value, _ = LOSSES[variant.ratio](
            LossInputs(
                policy_logprobs=self.policy,
                old_logprobs=self.old,
                ref_logprobs=self.ref,
                advantages=self.advantages * self.importance(name)[0],
                loss_weights=self.weights,
                answers=self.answers,
                beta=BETA,
                clip_eps=(variant.low, variant.high),
                estimator=variant.estimator,
            )
        )
        return value


def ragged_step(seed: int, drift: float = 0.3) -> tuple[list[list[Answer]], slow.Samplers, Tokens]:
    """Return random groups of ragged, empty and invalid answers, `drift` away from the sampler, also flat."""
    random = torch.Generator().manual_seed(seed)

    def near(values: torch.Tensor, by: float = 0.3) -> torch.Tensor:
        return values + by * torch.randn(len(values), generator=random, dtype=torch.float64)

    groups, samplers, flat = [], [], []
    for _ in range(3):
        rewards = torch.randint(0, 3, (4,), generator=random)
        valid = torch.rand(4, generator=random) < 0.8
        group, sampled = [], []
        for reward, ok, advantage in zip(rewards, valid, group_advantages(rewards, valid).tolist(), strict=True):
            sampler = -3 * torch.rand(int(torch.randint(0, 6, (), generator=random)), generator=random).double()
            old = near(sampler, drift)
            policy, ref = near(old).requires_grad_(), near(old)
            group.append(Answer(int(reward), bool(ok), list(policy), list(old), list(ref)))
            sampled.append(sampler.tolist())
            share = 1 / (3 * int(valid.sum()) * len(old)) if ok and len(old) else 0.0
            like = torch.full_like(old, advantage)
            number = torch.full((len(old),), len(flat))
            flat.append(Tokens(policy, old, sampler, ref, like, torch.full_like(old, share), number))
        groups.append(group)
        samplers.append(sampled)
    names = ("policy", "old", "sampler", "ref", "advantages", "weights", "answers")
    return groups, samplers, Tokens(*(torch.cat([getattr(answer, name) for answer in flat]) for name in names))


def gradient(loss: torch.Tensor, leaf: torch.Tensor) -> torch.Tensor:
    (found,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    return found


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("name", ACTIVE_MODES)
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_corrected_loss_and_gradient_equal_the_slow_reference(variant: Variant, name: str, seed: int) -> None:
    groups, samplers, tokens = ragged_step(seed)
    expected = slow.loss(groups, samplers, variant, BETA, 6, name, BOUNDS)
    found = tokens.loss(variant, name)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    leaves = [token for group in groups for answer in group for token in answer.policy]
    grads = torch.autograd.grad(expected, leaves, retain_graph=True, allow_unused=True)
    slow_gradient = torch.stack([torch.zeros(()).double() if grad is None else grad for grad in grads])
    torch.testing.assert_close(gradient(found, tokens.policy), slow_gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", TIS_MODES)
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_equal_sampler_and_policy_give_the_uncorrected_loss(variant: Variant, name: str) -> None:
    _, _, tokens = ragged_step(0, drift=0.0)
    found, plain = tokens.loss(variant, name), tokens.loss(variant, "none")
    assert torch.equal(found, plain)
    assert torch.equal(gradient(found, tokens.policy), gradient(plain, tokens.policy))


def test_without_correction_every_token_has_factor_one() -> None:
    _, _, tokens = ragged_step(1, drift=3.0)
    used, terms = tokens.importance("none")
    assert torch.equal(used, torch.ones_like(tokens.old))
    assert terms.used == (tokens.weights != 0).sum()
    assert terms.cut > 0


def test_corrections_do_not_change_the_kl() -> None:
    _, _, tokens = ragged_step(2)
    tokens.advantages = torch.zeros_like(tokens.advantages)
    for name in ACTIVE_MODES:
        assert torch.equal(tokens.loss(VARIANTS["grpo"], name), tokens.loss(VARIANTS["grpo"], "none"))


def test_token_and_sequence_ratios_by_hand() -> None:
    sampler = torch.log(torch.tensor([0.5, 0.5, 0.4, 0.2, 0.9, 0.9], dtype=torch.float64))
    old = torch.log(torch.tensor([0.25, 0.75, 0.8, 0.1, 0.1, 0.1], dtype=torch.float64))
    weights = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    answers = torch.tensor([0, 0, 1, 2, 2, 1])
    expected = {
        "token": [0.5, 1.5, 1.7, 0.5, 1.0, 1.0],
        "sequence": [0.75, 0.75, 1.7, 0.5, 0.5, 1.7],
        "icepop": [0.0, 1.5, 0.0, 0.0, 1.0, 1.0],
        "mis_token": [0.5, 1.5, 0.0, 0.5, 1.0, 1.0],
        "mis_sequence": [0.75, 0.75, 0.0, 0.5, 0.5, 0.0],
    }
    assert expected.keys() == set(ACTIVE_MODES)
    for name, factors in expected.items():
        used, terms = importance_weights(name, old, sampler, weights, answers, bounds=(0.6, 1.7))
        assert used.tolist() == pytest.approx(factors)
        assert terms.masked == factors[:4].count(0.0)
        assert terms.used.item() == pytest.approx(sum(factors[:4]))
        assert (terms.truncated.item(), terms.cut.item()) == (pytest.approx(0.5 + 1.5 + 1.7 + 0.5), 1)
        assert terms.sequence_raw.item() == pytest.approx(0.75 + 2.0 + 0.5)
        assert (terms.sequence_truncated.item(), terms.sequence_cut.item()) == (pytest.approx(0.75 + 1.7 + 0.5), 1)
        assert terms.answers == 3


@pytest.mark.parametrize("name", ACTIVE_MODES)
def test_factors_are_in_range_and_have_no_gradient(name: str) -> None:
    for seed in range(20):
        _, _, tokens = ragged_step(seed, drift=20.0)
        tokens.old.requires_grad_()
        used, terms = tokens.importance(name)
        assert not used.requires_grad and not terms.used.requires_grad
        assert used.dtype == tokens.old.dtype
        assert bool((used >= 0).all()) and bool((used <= CAP).all())


@pytest.mark.parametrize("name", ACTIVE_MODES)
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_micro_batches_add_up_to_the_same_loss_and_terms(variant: Variant, name: str) -> None:
    _, _, tokens = ragged_step(3)
    whole, (_, terms) = tokens.loss(variant, name), tokens.importance(name)
    order = torch.randperm(int(tokens.answers.max()) + 1, generator=torch.Generator().manual_seed(0))
    for size in (1, 5):
        losses, parts = [], []
        for chosen in order.split(size):
            part = tokens[torch.cat([(tokens.answers == answer).nonzero().squeeze(1) for answer in chosen])]
            part.answers = part.answers.unique(return_inverse=True)[1]
            losses.append(part.loss(variant, name))
            parts.append(part.importance(name)[1])
        torch.testing.assert_close(torch.stack(losses).sum(), whole)
        for field in RatioTerms.__slots__:
            total = torch.stack([getattr(part, field) for part in parts]).sum()
            torch.testing.assert_close(total, getattr(terms, field))


def test_any_shape_and_padding_gives_the_same_factors() -> None:
    _, _, tokens = ragged_step(4)
    count = len(tokens.old)
    padded = Tokens(*(torch.cat([value, value.new_zeros(60 - count)]).view(3, 4, 5) for value in vars(tokens).values()))
    for name in TIS_MODES:
        used, terms = padded.importance(name)
        expected, expected_terms = tokens.importance(name)
        torch.testing.assert_close(used.flatten()[:count], expected)
        for field in RatioTerms.__slots__:
            torch.testing.assert_close(getattr(terms, field), getattr(expected_terms, field))


@pytest.mark.parametrize("name", TIS_MODES)
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf"), 1e4, -1e4])
def test_masked_values_do_not_leak(poison: float, variant: Variant, name: str) -> None:
    policy = torch.tensor([-1.0, -2.0, poison], requires_grad=True)
    old, sampler = torch.tensor([-1.1, -1.9, poison]), torch.tensor([-1.4, -1.8, -poison])
    weights, answers = torch.tensor([0.5, 0.25, 0.0]), torch.zeros(3, dtype=torch.int64)
    tokens = Tokens(policy, old, sampler, old, torch.tensor([1.0, 1.0, poison]), weights, answers)
    loss, (_, terms) = tokens.loss(variant, name), tokens.importance(name)
    rest = tokens[torch.arange(2)]
    assert torch.equal(loss, rest.loss(variant, name))
    assert torch.equal(gradient(loss, policy)[:2], gradient(rest.loss(variant, name), policy)[:2])
    assert gradient(loss, policy)[2] == 0
    assert all(torch.isfinite(getattr(terms, field)) for field in RatioTerms.__slots__)


@pytest.mark.parametrize("name", TIS_MODES)
def test_a_call_without_active_tokens_has_zero_terms(name: str) -> None:
    zeros = torch.zeros(2, 3)
    used, terms = importance_weights(name, zeros - 1, zeros, zeros, zeros.long(), bounds=(0.5, 2.0))
    assert torch.equal(used, zeros + 1)
    assert all(getattr(terms, field) == 0 for field in RatioTerms.__slots__)


@pytest.mark.parametrize("name", ACTIVE_MODES)
def test_huge_ratios_are_capped_or_masked(name: str) -> None:
    old, sampler = torch.tensor([-0.1, -0.1]), torch.tensor([-2000.0, -2000.0])
    answers = torch.zeros(2, dtype=torch.int64)
    used, terms = importance_weights(name, old, sampler, torch.ones(2), answers, bounds=(0.5, 2.0))
    masks = name not in ("token", "sequence")
    assert used.tolist() == ([0.0, 0.0] if masks else [2.0, 2.0])
    assert terms.masked == (2 if masks else 0)
    assert (terms.truncated, terms.sequence_truncated) == (4.0, 2.0)


def test_ratios_at_the_bounds_and_of_one_are_trusted() -> None:
    ratios = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    sampler, weights, answers = torch.zeros_like(ratios), torch.ones_like(ratios), torch.arange(3)
    for name in ACTIVE_MODES:
        used, terms = importance_weights(name, ratios.log(), sampler, weights, answers, bounds=(0.5, 2.0))
        assert used.tolist() == pytest.approx([0.5, 1.0, 2.0]) and terms.masked == 0
        used, terms = importance_weights(name, sampler, sampler, weights, answers, bounds=(1.0, 1.0))
        assert used.tolist() == [1.0, 1.0, 1.0] and terms.masked == 0
        assert terms.cut == terms.sequence_cut == 0


def test_the_ratio_of_a_long_answer_is_summed_in_float64() -> None:
    random = torch.Generator().manual_seed(0)
    sampler = -3 * torch.rand(2000, generator=random)
    old = sampler + 0.01 * torch.randn(2000, generator=random)
    answers = torch.zeros(2000, dtype=torch.int64)
    _, terms = importance_weights("sequence", old, sampler, torch.ones(2000), answers, bounds=(0.5, 2.0))
    assert terms.sequence_raw.item() == pytest.approx(math.exp(math.fsum((old - sampler).tolist())), rel=1e-12)


@pytest.mark.parametrize("name", ["icepop", "mis_token", "mis_sequence"])
def test_a_masked_token_keeps_its_kl_and_its_share_of_the_weight(name: str) -> None:
    _, _, tokens = ragged_step(5, drift=2.0)
    used, terms = tokens.importance(name)
    masked = (used == 0) & (tokens.weights != 0)
    assert 0 < masked.sum() == terms.masked < (tokens.weights != 0).sum()
    silent = replace(tokens, advantages=torch.zeros_like(tokens.advantages))
    of_kl = gradient(silent.loss(VARIANTS["grpo"], "none"), tokens.policy)
    assert torch.equal(gradient(tokens.loss(VARIANTS["grpo"], name), tokens.policy)[masked], of_kl[masked])
    assert of_kl[masked].any()
