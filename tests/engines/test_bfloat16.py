"""The bfloat16 learner at ZeRO 1, 2 and 3: only each micro-batch's gradient is rounded, nothing after it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from othink_ray.config.schema import Config, LearnerConfig
from othink_ray.core.losses import LOSSES, LossInputs
from othink_ray.core.packing import pack
from othink_ray.engines.base import on_one_thread
from othink_ray.engines.learner_checkpoint import StoredState
from othink_ray.engines.policy import Policy
from othink_ray.families.base import Family
from othink_ray.families.hugging_face import prune_last_layer
from othink_ray.types import Pack
from tests.engines.learner_process import Outcome, Scenario, Shares, run_ranks
from tests.engines.reference_training import CLIP_EPS, TEMPERATURE
from tests.engines.samples import ask, batch_of, group_of, picture, scored
from tests.engines.tolerances import assert_same_stats, distance

pytestmark = pytest.mark.slow

STAGES = (1, 2, 3)
MICRO_BATCHES = 64
RATE = 4e-3  # differs from the rate with which the optimizer was created

Weights = dict[str, NDArray[np.float32]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Outcome of a learner on rank 0, and its saved float32 weights."""

    outcome: Outcome
    masters: Weights


@pytest.fixture(scope="module")
def packs(small_family: Family) -> list[Pack]:
    """One packed sample per micro-batch; with random advantages, their gradients point in different directions."""
    rng = np.random.default_rng(0)
    groups = [
        group_of(small_family, ask(f"{number}", picture(28, 56, number)), [3, 1 + number % 4], number)
        for number in range(MICRO_BATCHES)
    ]
    return [pack(scored(group, [0.0, 0.0]), rng.normal(size=2), MICRO_BATCHES) for group in groups]


@pytest.fixture(scope="module")
def two_steps(packs: list[Pack]) -> list[list[Pack]]:
    eighth = [replace(packed, loss_weights=packed.loss_weights * 8) for packed in packs[:16]]
    return [eighth[:8], eighth[8:]]


@pytest.fixture(scope="module")
def runs(
    small: Config,
    small_folder: Path,
    packs: list[Pack],
    two_steps: list[list[Pack]],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Run]:
    """Runs by name: "ranks, stage, scenario"."""
    scratch = tmp_path_factory.mktemp("bfloat16")
    model = replace(small.model, dtype="bfloat16")

    def run(ranks: int, scenarios: dict[str, Scenario]) -> dict[str, Run]:
        saved = {name: scratch / name.replace(", ", "_") for name in scenarios}
        with_saves = {name: replace(one, save=saved[name]) for name, one in scenarios.items()}
        [outcomes, *_] = run_ranks(model, small_folder, ranks, with_saves, scratch / f"of_{ranks}")
        return {
            name: Run(outcome=outcome, masters=masters_of(saved[name], outcome)) for name, outcome in outcomes.items()
        }

    def scenario(ranks: int, stage: int, steps: Sequence[Shares], **changes: object) -> Scenario:
        learner = replace(small.learner, zero_stage=stage, world_size=ranks, **changes)  # type: ignore[arg-type]
        return Scenario(learner=learner, steps=steps, beta=0.0, with_reference=False, temperature=TEMPERATURE)

    alone = {"1, 1, untouched": scenario(1, 1, []), "1, 2, at once": scenario(1, 2, [[[[step]]] for step in two_steps])}
    pair: dict[str, Scenario] = {}
    long = {"max_grad_norm": 1e6, "adam_eps": 1e-12, "weight_decay": 0.0}
    for stage in STAGES:
        whole = scenario(1, stage, [sharded(step, 1) for step in two_steps])
        second = scenario(2, stage, [sharded(two_steps[1], 2)])
        alone |= {
            f"1, {stage}, long": replace(scenario(1, stage, [sharded(packs, 1)], **long), rates=[RATE]),
            f"1, {stage}, whole": whole,
            f"1, {stage}, half": replace(whole, steps=whole.steps[:1]),
            f"1, {stage}, rest": replace(whole, steps=whole.steps[1:], load=scratch / f"1_{stage}_half"),
            f"1, {stage}, poisoned": scenario(1, stage, [poisoned(two_steps[0])]),
        }
        pair |= {
            f"2, {stage}, long": scenario(2, stage, [sharded(packs, 2)], gradient_checkpointing=True, **long),
            f"2, {stage}, rest": replace(second, load=scratch / f"1_{stage % 3 + 1}_half"),  # saved at another stage
        }
    return run(1, alone) | run(2, pair)


def masters_of(folder: Path, outcome: Outcome) -> Weights:
    stored = StoredState(folder)
    return {name: stored.read(name, "weight").numpy() for name in outcome.weights}


def sharded(packs: Sequence[Pack], ranks: int) -> Shares:
    """Return [rank][update][micro-batch][packed sample] with one update, and one sample per micro-batch."""
    return [[[[packed] for packed in packs[rank::ranks]]] for rank in range(ranks)]


def poisoned(packs: Sequence[Pack]) -> Shares:
    """Return two updates, the first with NaN advantages."""
    first, *others = packs
    bad = replace(first, advantages=np.full_like(first.advantages, np.nan))
    return [[[[bad]], [[packed] for packed in others]]]


# ---- a slow reference of the same learner


@dataclass(frozen=True, slots=True, kw_only=True)
class SlowStep:
    gradient: Weights  # bfloat16 gradients of the micro-batches, added up in float32
    masters: Weights


@on_one_thread()  # as the learner: a layer norm's backward sums in another order on two threads, one bfloat16 ulp apart
def slow_steps(learner: LearnerConfig, family: Family, steps: Sequence[Sequence[Pack]]) -> list[SlowStep]:
    """Train with torch's AdamW on float32 weights; the network's weights are their rounded copies."""
    network = family.load_network(torch.bfloat16)
    prune_last_layer(family.layers(network)[-1])
    policy = Policy(network, family, TEMPERATURE, logit_rows=1024)
    masters = {name: one.detach().float().requires_grad_() for name, one in network.named_parameters()}
    optimizer = torch.optim.AdamW(
        masters.values(),
        lr=learner.lr,
        betas=(learner.adam_beta1, learner.adam_beta2),
        eps=learner.adam_eps,
        weight_decay=learner.weight_decay,
    )
    steps_made = []
    for packs in steps:
        for master in masters.values():
            master.grad = torch.zeros_like(master)
        for packed in packs:
            policy.zero_grad()
            loss_of(policy, packed, family).backward()
            for name, parameter in network.named_parameters():
                if parameter.grad is not None:
                    masters[name].grad += parameter.grad
        gradient = {name: copied(master.grad) for name, master in masters.items() if master.grad is not None}
        torch.nn.utils.clip_grad_norm_(masters.values(), learner.max_grad_norm)
        optimizer.step()
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                parameter.copy_(masters[name])
        steps_made.append(SlowStep(gradient=gradient, masters={name: copied(one) for name, one in masters.items()}))
    return steps_made


def copied(tensor: Tensor) -> NDArray[np.float32]:
    copy: NDArray[np.float32] = tensor.detach().numpy().copy()
    return copy


def loss_of(policy: Policy, packed: Pack, family: Family) -> Tensor:
    batch = batch_of([packed], family)
    logprobs, _ = policy(batch)
    value, _ = LOSSES["grpo"](
        LossInputs(
            policy_logprobs=logprobs,
            old_logprobs=logprobs.detach(),
            ref_logprobs=None,
            advantages=batch.advantages,
            loss_weights=batch.loss_weights,
            answers=batch.answers,
            beta=0.0,
            clip_eps=(CLIP_EPS, CLIP_EPS),
            estimator="k3",
        )
    )
    return value


@pytest.fixture(scope="module")
def slow_gradient(small: Config, small_family: Family, packs: list[Pack]) -> Weights:
    [step] = slow_steps(small.learner, small_family, [packs])
    return step.gradient


@pytest.fixture(scope="module")
def slow(small: Config, small_family: Family, two_steps: list[list[Pack]]) -> list[SlowStep]:
    return slow_steps(small.learner, small_family, two_steps)


def change_of(masters: Weights, start: Weights) -> Weights:
    return {name: weight - start[name] for name, weight in masters.items()}


# ---- gradients and weights


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("ranks", [1, 2])
def test_bfloat16_gradients_are_summed_in_float32(
    small: Config, runs: dict[str, Run], slow_gradient: Weights, ranks: int, stage: int
) -> None:
    """Summed in bfloat16, gradients of 64 micro-batches are off by 1 percent. Two ranks use checkpointed layers."""
    moments = runs[f"{ranks}, {stage}, long"].outcome.first_moments
    gradient = {name: moment / (1 - small.learner.adam_beta1) for name, moment in moments.items()}
    error, name = distance(gradient, slow_gradient)
    assert error < 1e-5, name


@pytest.mark.parametrize("stage", STAGES)
def test_bfloat16_updates_train_float32_weights(runs: dict[str, Run], slow: list[SlowStep], stage: int) -> None:
    """Biases are 0 only in the first step: rounding before a bias is added shows in the second."""
    start = runs["1, 1, untouched"].masters
    for name, step in (("half", slow[0]), ("whole", slow[1])):
        trained = runs[f"1, {stage}, {name}"]
        error, worst = distance(change_of(trained.masters, start), change_of(step.masters, start))
        assert error < 1e-3, worst
        for tensor, weight in trained.outcome.weights.items():
            assert np.array_equal(weight, torch.from_numpy(trained.masters[tensor]).bfloat16().float().numpy()), tensor


@pytest.mark.parametrize("stage", STAGES)
def test_the_first_bfloat16_step_has_the_size_of_its_rate(runs: dict[str, Run], stage: int) -> None:
    changes = change_of(runs[f"1, {stage}, long"].masters, runs["1, 1, untouched"].masters)
    assert max(float(np.abs(change).max()) for change in changes.values()) == pytest.approx(RATE, rel=1e-3)


def test_micro_batches_change_bfloat16_updates_by_rounding_only(runs: dict[str, Run]) -> None:
    start, apart, at_once = (runs[f"1, {name}"] for name in ("1, untouched", "2, whole", "2, at once"))
    for found, other in zip(at_once.outcome.stats, apart.outcome.stats, strict=True):
        assert found.tokens == other.tokens
        assert found.grad_norm == pytest.approx(other.grad_norm, rel=0.03)
        assert found.entropy == pytest.approx(other.entropy, rel=1e-3)
    found, expected = (change_of(trained.masters, start.masters) for trained in (at_once, apart))
    whole = np.sqrt(sum(float((change**2).sum()) for change in expected.values()))
    off = np.sqrt(sum(float(((found[name] - change) ** 2).sum()) for name, change in expected.items()))
    assert off < 0.1 * whole


@pytest.mark.parametrize("stage", STAGES)
def test_a_bfloat16_update_with_nan_is_skipped(runs: dict[str, Run], stage: int) -> None:
    trained = runs[f"1, {stage}, poisoned"]
    [stats] = trained.outcome.stats
    assert stats.skipped == 1
    assert all(np.isfinite(weight).all() for weight in trained.masters.values())
    assert distance(trained.masters, runs["1, 1, untouched"].masters)[0] > 1e-4


# ---- save and load


@pytest.mark.parametrize("stage", STAGES)
def test_a_bfloat16_learner_resumes_exactly(runs: dict[str, Run], stage: int) -> None:
    whole, rest = runs[f"1, {stage}, whole"], runs[f"1, {stage}, rest"]
    assert repr(rest.outcome.stats) == repr(whole.outcome.stats[1:])  # the KL is NaN, which never compares equal
    assert distance(rest.masters, whole.masters)[0] == 0
    assert distance(rest.outcome.first_moments, whole.outcome.first_moments)[0] == 0
    assert distance(runs[f"1, {stage}, half"].masters, whole.masters)[0] > 1e-5


@pytest.mark.parametrize("stage", STAGES)
def test_bfloat16_resumes_on_other_ranks_and_stages(runs: dict[str, Run], stage: int) -> None:
    start, whole, rest = runs["1, 1, untouched"], runs[f"1, {stage}, whole"], runs[f"2, {stage}, rest"]
    assert_same_stats(rest.outcome.stats, whole.outcome.stats[1:])
    assert distance(change_of(rest.masters, start.masters), change_of(whole.masters, start.masters))[0] < 1e-3
