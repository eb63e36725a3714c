"""Whole algorithms (advantages, weights, loss and KL) against the slow reference and the golden numbers."""

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
from othink_ray.core.losses import LOSSES, LossInputs
from othink_ray.core.packed_sequence import answer_index, build_packed_sequence
from othink_ray.core.packing import LOSS_WEIGHTS, pack_step
from othink_ray.types import Completion, Group, Message, Pack, Prompt, ScoredGroup
from tests.reference import golden, variants
from tests.reference.variants import Variant

GOLDEN = json.loads(golden.FILE.read_text())
Step = list[list[dict[str, Any]]]


def scored_groups(step: Step) -> list[ScoredGroup]:
    """Return the step's groups as the driver has them; token ids are not used."""
    found = []
    for number, group in enumerate(step):
        message = Message(role="user", text="?")
        prompt = Prompt(id=f"q{number}", messages=(message,), images=(), answer="1", task="counting")
        answers = tuple(
            Completion(
                token_ids=np.arange(len(answer["old"])),
                sampler_logprobs=np.array(answer["old"], dtype=np.float32),
                text="",
                finish="stop",
            )
            for answer in group
        )
        found.append(
            ScoredGroup(
                group=Group(prompt=prompt, prompt_token_ids=np.arange(2), completions=answers, version=0),
                rewards=np.array([answer["reward"] for answer in group]),
                parts={},
                valid=np.array([answer["valid"] for answer in group]),
            )
        )
    return found


def advantages_of(step: Step, variant: Variant) -> np.ndarray:
    rewards = np.array([[answer["reward"] for answer in group] for group in step])
    valid = np.array([[answer["valid"] for answer in group] for group in step])
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
    return torch.tensor([value for group in step for answer in group for value in answer[name]], dtype=torch.float64)


def loss_of(
    samples: Sequence[int], packs: Sequence[Pack], leaf: torch.Tensor, step: Step, variant: Variant
) -> torch.Tensor:
    """Return the loss of some samples as one micro-batch; `leaf` holds the policy logprobs of the whole step."""
    lengths = [sum(len(answer["old"]) for answer in group) for group in step]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    indices = torch.cat([torch.arange(starts[sample], starts[sample + 1]) for sample in samples])
    chosen = [packs[sample] for sample in samples]
    advantages = np.concatenate([pack.advantages[pack.segments > 0] for pack in chosen])
    weights = np.concatenate([pack.loss_weights[pack.segments > 0] for pack in chosen])
    value, _ = LOSSES[variant.ratio](
        LossInputs(
            policy_logprobs=leaf[indices],
            old_logprobs=flat(step, "old")[indices],
            ref_logprobs=flat(step, "ref")[indices],
            advantages=torch.from_numpy(advantages),
            loss_weights=torch.from_numpy(weights),
            answers=answer_index(build_packed_sequence([pack.segments for pack in chosen])),
            beta=golden.BETA,
            clip_eps=(variant.low, variant.high),
            estimator=variant.estimator,
        )
    )
    return value


def fast(step: Step, variant: Variant, micro_batches: Sequence[Sequence[int]], updates: int) -> dict[str, Any]:
    """Compute the numbers of `golden.of_variant` with the package's code."""
    packs, leaf = packs_of(step, variant, updates), flat(step, "policy").requires_grad_()
    share = len(step) // updates
    losses = [torch.zeros((), dtype=torch.float64) for _ in range(updates)]
    for samples in micro_batches:
        losses[samples[0] // share] = losses[samples[0] // share] + loss_of(samples, packs, leaf, step, variant)
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
    rng = np.random.default_rng(seed)
    step = []
    for _ in range(4):
        group = []
        for _ in range(4):
            old = -3 * rng.random(int(rng.integers(0, 6)))
            answer = {"reward": float(rng.integers(0, 3)), "valid": bool(rng.random() < 0.85), "old": old.tolist()}
            group.append(
                answer | {name: (old + 0.3 * rng.standard_normal(len(old))).tolist() for name in ("policy", "ref")}
            )
        step.append(group)
    return step


@pytest.mark.parametrize("name", golden.VARIANTS)
def test_a_variant_gives_its_golden_numbers(name: str) -> None:
    found = fast(GOLDEN["step"], golden.VARIANTS[name], [[0, 1], [2, 3]], golden.UPDATES)
    assert_same(found, GOLDEN["variants"][name])


def test_the_slow_reference_still_gives_the_golden_numbers() -> None:
    made = golden.golden_numbers()
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
def test_variant_losses_and_gradients_equal_the_slow_reference(name: str, seed: int) -> None:
    step = random_step(seed)
    answers = golden.answers(step)
    expected = golden.of_variant(step, golden.VARIANTS[name]) if seed % 2 else None
    if expected is None:
        [value] = variants.loss(answers, golden.VARIANTS[name], golden.BETA, golden.MAX_TOKENS)
        assert fast(step, golden.VARIANTS[name], [[0, 1, 2, 3]], 1)["losses"] == pytest.approx([float(value.detach())])
    else:
        found = fast(step, golden.VARIANTS[name], [[0, 1], [2, 3]], golden.UPDATES)
        np.testing.assert_allclose(found["losses"], expected["losses"], rtol=1e-7, atol=1e-9)
        np.testing.assert_allclose(found["gradient"], expected["gradient"], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", golden.VARIANTS)
@pytest.mark.parametrize("micro_batches", [[[3, 1, 0, 2]], [[0], [1], [2], [3]], [[2], [3, 0, 1]]])
def test_variants_do_not_depend_on_the_micro_batches(name: str, micro_batches: list[list[int]]) -> None:
    step, variant = random_step(11), golden.VARIANTS[name]
    assert_same(fast(step, variant, micro_batches, 1), fast(step, variant, [[0, 1, 2, 3]], 1))


@pytest.mark.parametrize("name", golden.VARIANTS)
def test_a_group_of_equal_rewards_has_zero_advantages(name: str) -> None:
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
def test_conf_files_select_the_parts_of_their_golden_variant(name: str) -> None:
    algo = load([f"algo={name}"]).algo
    high = algo.clip_eps if algo.clip_eps_high is None else algo.clip_eps_high
    chosen = Variant(algo.advantage, algo.loss, algo.loss_weights, algo.kl.estimator, algo.clip_eps, high)
    assert chosen == golden.VARIANTS[name]
