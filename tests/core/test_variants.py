"""Whole algorithms: advantages, weights, loss and KL together, against the slow reference and the golden numbers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from othink_ray.config.load import conf_dir, groups, load
from othink_ray.core.advantages import ADVANTAGES
from othink_ray.core.kl import ESTIMATORS
from othink_ray.core.losses import LOSSES
from othink_ray.core.packed_sequence import answer_index, build_packed_sequence
from othink_ray.core.packing import LOSS_WEIGHTS, pack_step
from othink_ray.types import Completion, Group, Message, Pack, Prompt, ScoredGroup
from tests.reference import golden, variants
from tests.reference.variants import Variant

GOLDEN = json.loads(golden.FILE.read_text())
Step = list[list[dict[str, Any]]]


def scored_groups(step: Step) -> list[ScoredGroup]:
    """Each group as the driver sees it; what the learner thinks of a token stands in for its id."""
    found = []
    for number, group in enumerate(step):
        message = Message(role="user", text="?")
        prompt = Prompt(id=f"q{number}", messages=(message,), images=(), answer="1", task="counting")
        answers = tuple(
            Completion(
                token_ids=np.arange(len(one["old"])),
                sampler_logprobs=np.array(one["old"], dtype=np.float32),
                text="",
                finish="stop",
            )
            for one in group
        )
        found.append(
            ScoredGroup(
                group=Group(prompt=prompt, prompt_token_ids=np.arange(2), completions=answers, version=0),
                rewards=np.array([one["reward"] for one in group]),
                parts={},
                valid=np.array([one["valid"] for one in group]),
            )
        )
    return found


def advantages_of(step: Step, variant: Variant) -> np.ndarray:
    rewards = np.array([[one["reward"] for one in group] for group in step])
    valid = np.array([[one["valid"] for one in group] for group in step])
    return ADVANTAGES[variant.advantage](rewards, valid)


def packs_of(step: Step, variant: Variant, updates: int) -> list[Pack]:
    return pack_step(
        scored_groups(step),
        list(advantages_of(step, variant)),
        updates=updates,
        loss_weights=LOSS_WEIGHTS[variant.weights],
        max_tokens=golden.MAX_TOKENS,
        shared_prefix=True,
    )


def flat(step: Step, name: str) -> torch.Tensor:
    return torch.tensor([value for group in step for one in group for value in one[name]], dtype=torch.float64)


def loss_of(
    rows: Sequence[int], packs: Sequence[Pack], leaf: torch.Tensor, step: Step, variant: Variant
) -> torch.Tensor:
    """The fast loss of these rows as one micro-batch; `leaf` has the policy's logprobs of the whole step."""
    lengths = [sum(len(one["old"]) for one in group) for group in step]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    places = torch.cat([torch.arange(starts[row], starts[row + 1]) for row in rows])
    on_answers = [packs[row].segments > 0 for row in rows]
    advantages = np.concatenate([packs[row].advantages[own] for row, own in zip(rows, on_answers, strict=True)])
    weights = np.concatenate([packs[row].loss_weights[own] for row, own in zip(rows, on_answers, strict=True)])
    value, _ = LOSSES[variant.ratio](
        leaf[places],
        flat(step, "old")[places],
        flat(step, "ref")[places],
        torch.from_numpy(advantages),
        torch.from_numpy(weights),
        answers=answer_index(build_packed_sequence([packs[row].segments for row in rows])),
        beta=golden.BETA,
        clip_eps=(variant.low, variant.high),
        estimator=variant.estimator,
    )
    return value


def fast(step: Step, variant: Variant, micro_batches: Sequence[Sequence[int]], updates: int) -> dict[str, Any]:
    """As `golden.of_variant`, from the code that trains."""
    packs, leaf = packs_of(step, variant, updates), flat(step, "policy").requires_grad_()
    share = len(step) // updates
    losses = [torch.zeros((), dtype=torch.float64) for _ in range(updates)]
    for rows in micro_batches:
        losses[rows[0] // share] = losses[rows[0] // share] + loss_of(rows, packs, leaf, step, variant)
    (gradient,) = torch.autograd.grad(torch.stack(losses).sum(), leaf)
    return {
        "advantages": advantages_of(step, variant).tolist(),
        "losses": [float(value.detach()) for value in losses],
        "gradient": gradient.tolist(),
    }


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for name in ("advantages", "losses", "gradient"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-7, atol=1e-9, err_msg=name)


def random_step(seed: int) -> Step:
    dice = np.random.default_rng(seed)
    step = []
    for _ in range(4):
        group = []
        for _ in range(4):
            old = -3 * dice.random(int(dice.integers(0, 6)))
            one = {"reward": float(dice.integers(0, 3)), "valid": bool(dice.random() < 0.85), "old": old.tolist()}
            group.append(
                one | {name: (old + 0.3 * dice.standard_normal(len(old))).tolist() for name in ("policy", "ref")}
            )
        step.append(group)
    return step


@pytest.mark.parametrize("name", golden.VARIANTS)
def test_a_variant_gives_its_golden_numbers(name: str) -> None:
    found = fast(GOLDEN["step"], golden.VARIANTS[name], [[0, 1], [2, 3]], golden.UPDATES)
    assert_same(found, GOLDEN["variants"][name])


def test_the_slow_reference_still_gives_the_golden_numbers() -> None:
    made = golden.made()
    assert made.keys() == GOLDEN.keys()
    for name in golden.VARIANTS:
        assert_same(made["variants"][name], GOLDEN["variants"][name])
    for key in ("target", "accuracy"):
        assert made[key] == pytest.approx(GOLDEN[key], rel=1e-12)


def test_the_golden_variants_differ() -> None:
    numbers = {name: tuple(GOLDEN["variants"][name]["gradient"]) for name in golden.VARIANTS}
    assert numbers["grpo"] == numbers["grpo_d"]
    assert len(set(numbers.values())) == len(numbers) - 1


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", golden.VARIANTS)
def test_a_variant_equals_the_slow_reference_in_losses_and_gradient(name: str, seed: int) -> None:
    step = random_step(seed)
    own = golden.answers(step)
    expected = golden.of_variant(step, golden.VARIANTS[name]) if seed % 2 else None
    if expected is None:
        [value] = variants.loss(own, golden.VARIANTS[name], golden.BETA, golden.MAX_TOKENS)
        assert fast(step, golden.VARIANTS[name], [[0, 1, 2, 3]], 1)["losses"] == pytest.approx([float(value.detach())])
    else:
        found = fast(step, golden.VARIANTS[name], [[0, 1], [2, 3]], golden.UPDATES)
        np.testing.assert_allclose(found["losses"], expected["losses"], rtol=1e-7, atol=1e-9)
        np.testing.assert_allclose(found["gradient"], expected["gradient"], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", golden.VARIANTS)
@pytest.mark.parametrize("micro_batches", [[[3, 1, 0, 2]], [[0], [1], [2], [3]], [[2], [3, 0, 1]]])
def test_neither_micro_batches_nor_their_order_nor_padding_change_a_variant(
    name: str, micro_batches: list[list[int]]
) -> None:
    step, variant = random_step(11), golden.VARIANTS[name]
    assert_same(fast(step, variant, micro_batches, 1), fast(step, variant, [[0, 1, 2, 3]], 1))


@pytest.mark.parametrize("name", golden.VARIANTS)
def test_a_group_of_equal_rewards_is_pulled_by_the_kl_alone(name: str) -> None:
    step, variant = GOLDEN["step"], golden.VARIANTS[name]
    assert not advantages_of(step, variant)[2].any()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_an_estimator_gives_its_golden_values_and_gradients(estimator: str) -> None:
    policy, ref = torch.tensor(golden.PAIRS, dtype=torch.float64).unbind(1)
    policy.requires_grad_()
    value = ESTIMATORS[estimator](policy, ref)
    (gradient,) = torch.autograd.grad(value.sum(), policy)
    found = torch.stack([value.detach(), gradient], dim=1).numpy()
    np.testing.assert_allclose(found, GOLDEN["estimators"][estimator], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", groups(conf_dir())["algo"])
def test_a_conf_file_names_the_parts_of_its_golden_variant(name: str) -> None:
    algo = load([f"algo={name}"]).algo
    high = algo.clip_eps if algo.clip_eps_high is None else algo.clip_eps_high
    chosen = Variant(algo.advantage, algo.loss, algo.loss_weights, algo.kl.estimator, algo.clip_eps, high)
    assert chosen == golden.VARIANTS[name]
