"""Losses as weighted sums over tokens: the slow reference, clipping, masking and micro-batches."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from othink_ray.core.advantages import EPS, group_advantages
from othink_ray.core.losses import LOSSES, LossInputs, LossTerms, grpo_loss
from tests.reference import grpo_d

CLIP = (0.2, 0.2)


@dataclass
class Tokens:
    """Inputs of a loss: the answer tokens of a step, flat (N,)."""

    policy: torch.Tensor
    old: torch.Tensor
    ref: torch.Tensor | None
    advantages: torch.Tensor
    weights: torch.Tensor
    answers: torch.Tensor

    def __getitem__(self, rows: torch.Tensor) -> Tokens:
        return Tokens(*(value[rows] for value in vars(self).values()))

    def loss(
        self, name: str, beta: float = 0.05, clip_eps: tuple[float, float] = CLIP, estimator: str = "k3"
    ) -> tuple[torch.Tensor, LossTerms]:
        return LOSSES[name](
            LossInputs(
                policy_logprobs=self.policy,
                old_logprobs=self.old,
                ref_logprobs=self.ref,
                advantages=self.advantages,
                loss_weights=self.weights,
                answers=self.answers,
                beta=beta,
                clip_eps=clip_eps,
                estimator=estimator,
            )
        )

    def grpo(self, beta: float = 0.05) -> tuple[torch.Tensor, LossTerms]:
        return self.loss("grpo", beta)


def ragged_step(seed: int) -> tuple[list[list[grpo_d.Answer]], Tokens]:
    """Return random groups with ragged, empty and invalid answers, and the same step as flat tokens."""
    random = torch.Generator().manual_seed(seed)
    groups, flat = [], []
    group_count, group_size = 3, 4
    for _ in range(group_count):
        rewards = torch.randint(0, 3, (group_size,), generator=random)
        valid = torch.rand(group_size, generator=random) < 0.8
        advantages = group_advantages(rewards, valid)
        group = []
        for reward, ok, advantage in zip(rewards.tolist(), valid.tolist(), advantages.tolist(), strict=True):
            length = int(torch.randint(0, 5, (), generator=random))
            old = -3 * torch.rand(length, generator=random, dtype=torch.float64)
            policy = (old + 0.3 * torch.randn(length, generator=random, dtype=torch.float64)).requires_grad_()
            ref = old + 0.3 * torch.randn(length, generator=random, dtype=torch.float64)
            group.append(grpo_d.Answer(reward, ok, list(policy), list(old), list(ref)))
            weight = 1 / (group_count * int(valid.sum()) * length) if ok and length else 0.0
            flat.append(
                Tokens(
                    policy,
                    old,
                    ref,
                    torch.full_like(old, advantage),
                    torch.full_like(old, weight),
                    torch.full((length,), len(flat)),
                )
            )
        groups.append(group)
    names = ("policy", "old", "ref", "advantages", "weights", "answers")
    return groups, Tokens(*(torch.cat([getattr(answer, name) for answer in flat]) for name in names))


def one_token(policy: float, *, old: float = -1.0, ref: float = -1.0, advantage: float = 1.0) -> Tokens:
    values = [torch.tensor([value], dtype=torch.float64) for value in (policy, old, ref, advantage, 1.0)]
    values[0].requires_grad_()
    return Tokens(*values, answers=torch.zeros(1, dtype=torch.int64))


def gradient(tokens: Tokens, beta: float = 0.05, name: str = "grpo") -> torch.Tensor:
    loss, _ = tokens.loss(name, beta)
    (grad,) = torch.autograd.grad(loss, tokens.policy, retain_graph=True)
    return grad


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("beta", [0.0, 0.05])
def test_grpo_equals_the_slow_reference_in_loss_and_gradient(seed: int, beta: float) -> None:
    groups, tokens = ragged_step(seed)
    slow = grpo_d.loss(groups, beta, 0.2, EPS)
    fast, _ = tokens.grpo(beta=beta)
    torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-12)
    leaves = [token for group in groups for answer in group for token in answer.policy]
    slow_grad = torch.autograd.grad(slow, leaves, retain_graph=True, allow_unused=True)
    expected = torch.stack([torch.zeros(()).double() if grad is None else grad for grad in slow_grad])
    torch.testing.assert_close(gradient(tokens, beta), expected, rtol=1e-9, atol=1e-12)


def test_ratio_one_without_kl_gives_the_reinforce_gradient() -> None:
    policy = torch.tensor([-0.5, -1.5, -2.0], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([2.0, -1.0, 0.0], dtype=torch.float64)
    weights = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    tokens = Tokens(policy, policy.detach(), policy.detach(), advantages, weights, torch.tensor([0, 1, 1]))
    torch.testing.assert_close(gradient(tokens, beta=0.0), torch.tensor([-1.0, 0.25, 0.0], dtype=torch.float64))


def test_beta_zero_gives_the_gradient_without_a_reference() -> None:
    _, tokens = ragged_step(1)
    without, _ = grpo_loss(
        LossInputs(
            policy_logprobs=tokens.policy,
            old_logprobs=tokens.old,
            ref_logprobs=None,
            advantages=tokens.advantages,
            loss_weights=tokens.weights,
            answers=tokens.answers,
            beta=0.05,
            clip_eps=CLIP,
            estimator="k3",
        )
    )
    (expected,) = torch.autograd.grad(without, tokens.policy, retain_graph=True)
    assert torch.equal(gradient(tokens, beta=0.0), expected)
    assert not torch.equal(gradient(tokens, beta=0.05), expected)


def test_without_a_reference_the_kl_of_all_tokens_is_one_zero() -> None:
    tokens = ragged_step(1)[1]
    tokens.ref = None
    assert torch.equal(tokens.grpo()[1].kl_sum, torch.zeros((), dtype=torch.float64))


def test_beta_zero_ignores_a_broken_reference() -> None:
    tokens = one_token(-1.2, ref=float("-inf"))
    assert torch.equal(tokens.grpo(beta=0.0)[0], one_token(-1.2).grpo(beta=0.0)[0])


def test_equal_rewards_leave_only_the_kl_gradient() -> None:
    tokens = one_token(-1.2, advantage=0.0)
    # d/dp of beta * (e^(ref - p) - (ref - p) - 1) = beta * (1 - e^(ref - p))
    expected = 0.05 * (1 - torch.tensor([0.2], dtype=torch.float64).exp())
    torch.testing.assert_close(gradient(tokens), expected)
    assert not gradient(tokens, beta=0.0).any()


@pytest.mark.parametrize(
    ("log_ratio", "advantage", "cut"),
    [
        (0.5, 1.0, True),
        (0.5, -1.0, False),
        (-0.5, 1.0, False),
        (-0.5, -1.0, True),
        (0.1, 1.0, False),
        (-0.1, -1.0, False),
    ],
)
def test_the_clip_cuts_only_excessive_gains(log_ratio: float, advantage: float, cut: bool) -> None:
    tokens = one_token(-1.0 + log_ratio, advantage=advantage)
    ratio = torch.tensor([log_ratio], dtype=torch.float64).exp()
    expected = torch.zeros(1, dtype=torch.float64) if cut else -advantage * ratio
    torch.testing.assert_close(gradient(tokens, beta=0.0), expected)
    assert tokens.grpo()[1].clipped.item() == cut


def test_any_micro_batch_split_and_order_gives_the_same_loss() -> None:
    _, tokens = ragged_step(2)
    whole, expected = tokens.grpo()[0], gradient(tokens)
    order = torch.randperm(len(tokens.policy), generator=torch.Generator().manual_seed(0))
    for size in (1, 3, 7):
        parts = [tokens[rows].grpo()[0] for rows in order.split(size)]
        total = torch.stack(parts).sum()
        torch.testing.assert_close(total, whole)
        torch.testing.assert_close(torch.autograd.grad(total, tokens.policy, retain_graph=True)[0], expected)


def test_any_leading_shape_and_padding_gives_the_same_loss() -> None:
    _, tokens = ragged_step(3)
    padded = Tokens(
        *(torch.cat([value, value.new_zeros(60 - len(value))]).view(3, 4, 5) for value in vars(tokens).values())
    )
    torch.testing.assert_close(padded.grpo()[0], tokens.grpo()[0])


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("opposite", [False, True])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf"), 1e4, -1e4])
def test_masked_values_do_not_leak(poison: float, opposite: bool, estimator: str, name: str) -> None:
    policy = torch.tensor([-1.0, poison], requires_grad=True)
    other = torch.tensor([-1.1, -poison if opposite else poison])
    weights = torch.tensor([0.5, 0.0])
    tokens = Tokens(policy, other, other, other, weights, torch.zeros(2, dtype=torch.int64))
    loss, terms = tokens.loss(name, estimator=estimator)
    clean, _ = tokens[torch.tensor([0])].loss(name, estimator=estimator)
    (grad,), (clean_grad,) = torch.autograd.grad(loss, policy), torch.autograd.grad(clean, policy)
    assert torch.equal(loss, clean)
    assert torch.equal(grad, clean_grad)
    assert grad[1] == 0
    assert all(torch.isfinite(getattr(terms, field)) for field in LossTerms.__slots__)


def test_a_huge_ratio_on_an_answer_without_advantage_is_not_nan() -> None:
    tokens = one_token(-1.0, old=-2000.0, advantage=0.0)
    assert tokens.grpo(beta=0.0)[0] == 0
    assert not gradient(tokens, beta=0.0).any()


def test_terms_count_active_tokens_only() -> None:
    policy = torch.log(torch.tensor([0.5, 0.6, 0.1, 0.9]))
    old = torch.log(torch.tensor([0.5, 0.3, 0.2, 0.1]))
    advantages, weights = torch.tensor([1.0, 1.0, 1.0, 1.0]), torch.tensor([0.2, 0.2, 0.2, 0.0])
    _, terms = Tokens(policy, old, old, advantages, weights, torch.tensor([0, 0, 1, 1])).grpo()
    assert terms.clipped.item() == 1
    expected_kl = sum(r - torch.tensor(r).log().item() - 1 for r in (1.0, 0.5, 2.0))
    assert terms.kl_sum.item() == pytest.approx(expected_kl, rel=1e-5)


def test_kl_is_measured_even_where_beta_is_zero() -> None:
    tokens = one_token(-1.2)
    assert tokens.grpo(beta=0.0)[1].kl_sum.item() == pytest.approx(tokens.grpo(beta=0.5)[1].kl_sum.item())
    assert tokens.grpo(beta=0.0)[1].kl_sum.item() > 0


@pytest.mark.parametrize("name", LOSSES)
def test_a_dummy_sample_has_zero_loss_gradient_and_terms(name: str) -> None:
    policy = torch.full((2, 3), -1.0, requires_grad=True)
    zeros = torch.zeros(2, 3)
    loss, terms = Tokens(policy, zeros, zeros, zeros, zeros, zeros.long()).loss(name)
    loss.backward()
    assert loss == 0
    assert policy.grad is not None and torch.equal(policy.grad, zeros)
    assert all(getattr(terms, field) == 0 for field in LossTerms.__slots__)


def test_terms_carry_no_gradient() -> None:
    terms = ragged_step(4)[1].grpo()[1]
    assert not any(getattr(terms, field).requires_grad for field in LossTerms.__slots__)


def test_sft_is_the_weighted_negative_logprob() -> None:
    policy = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    weights = torch.tensor([0.5, 0.25, 0.0])
    zeros = torch.zeros(3)
    loss, _ = Tokens(policy, zeros, zeros, zeros, weights, zeros.long()).loss("sft")
    loss.backward()
    assert loss.item() == 1.0
    assert policy.grad is not None and torch.equal(policy.grad, -weights)


# ---- GRPO variants


def answers_as_tokens(log_ratios: list[list[float]], advantages: list[float]) -> Tokens:
    """Return answers with the given log ratios per token; every answer weighs the same, as in Eq. 4."""
    policy = torch.tensor(
        [value - 2.0 for answer in log_ratios for value in answer], dtype=torch.float64
    ).requires_grad_()
    old = torch.full_like(policy, -2.0).detach()
    lengths = torch.tensor([len(answer) for answer in log_ratios])
    weights = (1.0 / (len(lengths) * lengths)).double().repeat_interleave(lengths)
    answers = torch.arange(len(lengths)).repeat_interleave(lengths)
    return Tokens(policy, old, old, torch.tensor(advantages).double().repeat_interleave(lengths), weights, answers)


def test_clip_higher_widens_only_the_upper_bound() -> None:
    for log_ratio, advantage, cut_by_both, cut_by_higher in ((0.24, 1.0, True, False), (-0.24, -1.0, True, True)):
        tokens = answers_as_tokens([[log_ratio]], [advantage])
        assert tokens.loss("grpo", 0.0, (0.2, 0.2))[1].clipped.item() == cut_by_both
        loss, terms = tokens.loss("grpo", 0.0, (0.2, 0.28))
        assert terms.clipped.item() == cut_by_higher
        (grad,) = torch.autograd.grad(loss, tokens.policy)
        assert bool(grad.any()) != cut_by_higher


def test_the_gspo_ratio_is_the_geometric_mean_over_tokens() -> None:
    tokens = answers_as_tokens([[0.3, -0.1, 0.1], [-0.2]], [2.0, -1.0])
    loss, _ = tokens.loss("gspo", 0.0, (0.5, 0.5))
    first, second = torch.tensor([0.1, -0.2], dtype=torch.float64).exp()
    torch.testing.assert_close(loss, -(2 * first - second) / 2)
    (grad,) = torch.autograd.grad(loss, tokens.policy)
    expected = torch.stack([-first / 3, -first / 3, -first / 3, second / 2])
    torch.testing.assert_close(grad, expected)


def test_gspo_clips_whole_answers() -> None:
    tokens = answers_as_tokens([[0.3, -0.1, 0.1], [-0.2]], [2.0, 1.0])
    loss, terms = tokens.loss("gspo", 0.0, (0.01, 0.01))
    (grad,) = torch.autograd.grad(loss, tokens.policy)
    assert terms.clipped.item() == 3
    assert not grad[:3].any() and grad[3] != 0


def test_gspo_of_one_token_answers_is_grpo() -> None:
    tokens = answers_as_tokens([[0.3], [-0.4], [0.0]], [1.0, -1.0, 0.5])
    torch.testing.assert_close(tokens.loss("gspo")[0], tokens.loss("grpo")[0])


def test_gspo_is_independent_of_split_order_and_padding() -> None:
    _, tokens = ragged_step(5)
    whole, expected = tokens.loss("gspo")[0], gradient(tokens, name="gspo")
    order = torch.randperm(int(tokens.answers.max()) + 1, generator=torch.Generator().manual_seed(1)).tolist()
    for size in (1, 4, len(order)):
        parts = []
        for start in range(0, len(order), size):
            rows = torch.cat(
                [(tokens.answers == answer).nonzero().squeeze(1) for answer in order[start : start + size]]
            )
            part = tokens[rows]
            part.answers = part.answers.unique(return_inverse=True)[1]
            parts.append(part.loss("gspo")[0])
        total = torch.stack(parts).sum()
        torch.testing.assert_close(total, whole)
        torch.testing.assert_close(torch.autograd.grad(total, tokens.policy, retain_graph=True)[0], expected)
    padded = Tokens(
        *(torch.cat([value, value.new_zeros(60 - len(value))]).view(3, 4, 5) for value in vars(tokens).values())
    )
    torch.testing.assert_close(padded.loss("gspo")[0], whole)


@pytest.mark.parametrize(("estimator", "pull"), [("k1", 1.0), ("k2", 0.2), ("k3", 1 - torch.tensor(-0.2).exp().item())])
def test_the_estimator_determines_the_kl_gradient(estimator: str, pull: float) -> None:
    tokens = one_token(-0.8, old=-0.8, ref=-1.0, advantage=0.0)
    loss, terms = tokens.loss("grpo", 0.5, estimator=estimator)
    (grad,) = torch.autograd.grad(loss, tokens.policy)
    assert grad.item() == pytest.approx(0.5 * pull)
    assert terms.kl_sum.item() == pytest.approx(tokens.loss("grpo", 0.5)[1].kl_sum.item())
