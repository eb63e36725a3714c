"""Adapters in the rollout engines: served exactly as pushed, in all families, and in bfloat16 with full effect."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from othink_ray.config.schema import Config, LearnerConfig, LoraConfig, ModelConfig
from othink_ray.engines.hf_rollout import HFRollout
from othink_ray.engines.lora import AdapterError, require_servable, served_adapters
from othink_ray.engines.policy import DTYPES, Policy, choose_trained, trained_weights
from othink_ray.families import FAMILIES, open_family
from othink_ray.types import Probe, Prompt
from othink_ray.weights import from_buckets, to_buckets
from tests.contracts.adapted_engine import CANDIDATES, SAMPLING, Adapted, run
from tests.engines.samples import MIXED, batch_of, distributions, give, learner_gap, row_of
from tests.families.checkpoints import build_checkpoint

pytestmark = pytest.mark.slow

LORA = LoraConfig(rank=5, alpha=15, targets=("text", "vision", "projector"))  # a rank that vLLM pads, a scale of 3
TEXT = replace(LORA, targets=("text",))
COARSE = "bfloat16"


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A learner's policy with trained adapters, and the same policy before training."""

    model: ModelConfig
    learner: LearnerConfig
    policy: Policy
    base: Policy
    prompts: Sequence[Prompt]

    @property
    def pushed(self) -> list[tuple[str, Tensor]]:
        return [(weight.name, weight.pushed()) for weight in trained_weights(self.policy.network)]

    @property
    def nothing(self) -> list[tuple[str, Tensor]]:
        return [(name, weight * (".lora_A." in name)) for name, weight in self.pushed]


def adapted(model: ModelConfig, learner: LearnerConfig) -> Policy:
    family = open_family(model, str(model.path))
    network = family.load_network(DTYPES[model.dtype])
    choose_trained(family, network, learner)
    return Policy(network, family, 1.0, logit_rows=64).eval()


def ups(network: nn.Module) -> list[Tensor]:
    return [parameter for name, parameter in network.named_parameters() if ".lora_B." in name]


def random_case(model: ModelConfig, learner: LearnerConfig) -> Case:
    policy = adapted(model, learner)
    base, generator = copy.deepcopy(policy), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for up in ups(policy.network):
            up.copy_(0.05 * torch.randn(up.shape, generator=generator))
    return Case(model=model, learner=learner, policy=policy, base=base, prompts=MIXED)


def small_steps(case: Case, learner: LearnerConfig, steps: int, size: float) -> Case:
    """Return the policy after `steps` Adam steps in one direction: B is +-(steps * size)."""
    policy = adapted(replace(case.model, dtype="float32"), learner)
    batch = batch_of([row_of(group) for group in _answers(case)], policy.family)
    policy(batch)[0].sum().backward()
    coarse = adapted(case.model, learner)
    with torch.no_grad():
        for up, exact in zip(ups(coarse.network), ups(policy.network), strict=True):
            assert exact.grad is not None
            up.copy_(steps * size * exact.grad.sign())
    return replace(case, learner=learner, policy=coarse, base=adapted(case.model, learner))


def _answers(case: Case) -> list:  # type: ignore[type-arg]
    from othink_ray.engines.demonstrations import Demonstrations

    return Demonstrations(case.policy.family).answer(case.prompts[:8])


@pytest.fixture(scope="module")
def cases(
    config: Config,
    texts: list[str],
    taught: Policy,
    scenes: Sequence[Prompt],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Case]:
    found = {}
    for name in FAMILIES:
        folder = tmp_path_factory.mktemp(name)
        build_checkpoint(name, folder, texts)
        model = replace(config.model, family=name, path=str(folder), tiny=None)
        served = open_family(model, str(folder)).vllm_adapts_tower
        found[name] = random_case(model, replace(config.learner, lora=LORA if served else TEXT))
    folder = tmp_path_factory.mktemp(COARSE)
    taught.family.save(folder, taught.network, taught.network.named_parameters())
    model = replace(config.model, path=str(folder), dtype="bfloat16")
    learner = replace(config.learner, lora=LoraConfig(rank=16, alpha=32, targets=("text",)))
    start = replace(random_case(model, learner), prompts=scenes)
    return found | {COARSE: small_steps(start, learner, steps=1500, size=1e-5)}


@pytest.fixture(scope="module")
def outcomes(config: Config, cases: dict[str, Case]) -> Iterator[dict[str, Future[Adapted]]]:
    """Run each case in a separate vLLM engine: first an adapter of zeros, then the trained one in small buckets."""
    with ProcessPoolExecutor(2, mp_context=get_context("spawn"), max_tasks_per_child=1) as processes:
        futures = {}
        for name, case in cases.items():
            served = served_adapters(case.policy.family, case.learner)
            pushes = [list(to_buckets(case.nothing, 2**20)), list(to_buckets(case.pushed, 4096))]
            futures[name] = processes.submit(
                *(run, case.model, config.rollout, str(case.model.path), served, case.prompts, pushes)
            )
        yield futures


@pytest.mark.parametrize("name", [*FAMILIES, COARSE])
def test_layers_use_exactly_the_pushed_factors(
    name: str, cases: dict[str, Case], outcomes: dict[str, Future[Adapted]]
) -> None:
    used = dict(from_buckets(outcomes[name].result().used))
    assert used.keys() == {tensor for tensor, _ in cases[name].pushed}
    assert all(torch.equal(used[tensor], weight) for tensor, weight in cases[name].pushed)
    assert all(used[tensor].dtype == weight.dtype for tensor, weight in cases[name].pushed)


@pytest.mark.parametrize("name", FAMILIES)
def test_an_engine_samples_from_the_policy_with_its_adapters(
    name: str, cases: dict[str, Case], outcomes: dict[str, Future[Adapted]]
) -> None:
    case, outcome = cases[name], outcomes[name].result()
    opened, *pushed = outcome.opened, *outcome.pushed
    for policy, groups in ((case.base, opened), (case.base, pushed[0]), (case.policy, pushed[1])):
        assert len(groups) == len(MIXED)
        assert max(learner_gap(policy, policy.family, group).max() for group in groups) < 1e-4
    assert min(learner_gap(case.policy, case.policy.family, group).max() for group in pushed[0]) > 0.01
    assert [[group.version for group in groups] for groups in (opened, *pushed)] == [[v] * 5 for v in (-1, 0, 1)]


@pytest.mark.parametrize("name", FAMILIES)
def test_an_adapter_of_zeros_changes_no_seeded_answer(name: str, outcomes: dict[str, Future[Adapted]]) -> None:
    outcome = outcomes[name].result()
    before, after = (
        {group.prompt.id: [answer.token_ids.tolist() for answer in group.completions] for group in groups}
        for groups in (outcome.opened, outcome.pushed[0])
    )
    assert before == after


@pytest.mark.parametrize("name", FAMILIES)
def test_a_factor_without_a_layer_is_refused(name: str, outcomes: dict[str, Future[Adapted]]) -> None:
    assert "has no adapted layer for model." in outcomes[name].result().refused


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_that_are_never_pushed_are_held_once(name: str, outcomes: dict[str, Future[Adapted]]) -> None:
    """On CPUs only as a packed copy, except for the head; the embedding, tied to the head or not, is not packed."""
    [unpacked] = outcomes[name].result().unpacked
    assert unpacked.endswith("lm_head")


# ---- bfloat16


def distributions_of(policy: Policy, probes: Sequence[Probe]) -> Tensor:
    with torch.no_grad():
        return distributions(policy, batch_of([row_of(probe.group) for probe in probes], policy.family))


def slope(case: Case, before: Sequence[Probe], after: Sequence[Probe]) -> tuple[float, float, int]:
    """Regress the sampler's logprob changes on the float32 changes of at least 0.1 nats.

    Return the slope, half of its 95 % interval, and the number of points. Rounding is the same wherever a token is
    likely at the same position, so that errors are clustered by (position, token).
    """
    in_float = replace(case.model, dtype="float32")
    exact = [adapted(in_float, case.learner) for _ in range(2)]
    exact[1].network.load_state_dict({k: v.float() for k, v in case.policy.network.state_dict().items()})
    exact[0].network.load_state_dict({k: v.float() for k, v in case.base.network.state_dict().items()})
    with torch.no_grad():
        change = distributions_of(exact[1], before) - distributions_of(exact[0], before)
    rows, points = iter(change), []
    for one, other in zip(before, after, strict=True):
        same = True
        for index in range(len(one.candidates)):
            row, ours = next(rows), (p.group.completions[0].token_ids for p in (one, other))
            same = same and index < len(other.candidates)
            if same:
                there = dict(zip(other.candidates[index].tolist(), other.logprobs[index].tolist(), strict=True))
                for token, logprob in zip(one.candidates[index].tolist(), one.logprobs[index].tolist(), strict=True):
                    if token in there and abs(float(row[token])) >= 0.1:
                        points.append((float(row[token]), there[token] - logprob, index * 1000 + token))
                mine, theirs = ours
                same = mine[index] == theirs[index]
    x, y, cluster = (np.array(column) for column in zip(*points, strict=True))
    found = float(x @ y / (x @ x))
    scores = [float((x * (y - found * x))[cluster == each].sum()) for each in set(cluster.tolist())]
    return found, 1.96 * float(np.sqrt(np.square(scores).sum()) / (x @ x)), len(points)


def test_a_bfloat16_sampler_moves_as_a_float32_learner(
    cases: dict[str, Case], outcomes: dict[str, Future[Adapted]]
) -> None:
    before, after = outcomes[COARSE].result().probes
    found, margin, points = slope(cases[COARSE], before, after)
    print(f"slope {found:.4f} +- {margin:.4f} over {points} logprobs")
    assert points > 3000
    assert found - margin > 0.98 and found + margin < 1.02, (found, margin, points)


def test_the_hf_engine_holds_pushed_adapters_unchanged(cases: dict[str, Case], config: Config) -> None:
    """Transformers computes the head in bfloat16, so that its logprobs measure changes less exactly."""
    case = cases[COARSE]
    engine = HFRollout(
        config.rollout, case.model, case.policy.family, served_adapters(case.policy.family, case.learner)
    )
    probes = []
    for version, weights in enumerate((case.nothing, case.pushed)):
        give(engine, weights, version)
        probes.append(engine.probe(case.prompts[:24], replace(SAMPLING, answers=1), CANDIDATES))
        held = dict(trained_weights_of(engine.network))
        assert all(torch.equal(held[name], weight) for name, weight in weights)
    found, margin, points = slope(case, *probes)
    # Merged into a bfloat16 matrix, at most two thirds of the delta would survive rounding.
    assert points > 1000 and abs(found - 1) < 0.1 and margin < 0.05, (found, margin, points)


def trained_weights_of(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for weight in trained_weights(network):
        yield weight.name, weight.parameter


# ---- layers whose adapters vLLM does not serve


@pytest.mark.parametrize("name", FAMILIES)
def test_family_and_vllm_agree_on_tower_adapters(name: str, cases: dict[str, Case]) -> None:
    from transformers import AutoConfig
    from vllm import ModelRegistry

    [architecture] = AutoConfig.from_pretrained(cases[name].model.path).architectures
    served = ModelRegistry.models[architecture].load_model_cls().supports_tower_connector_lora
    assert cases[name].policy.family.vllm_adapts_tower == served


def test_adapters_that_vllm_cannot_serve_are_refused(cases: dict[str, Case]) -> None:
    case = cases["internvl"]
    everywhere = replace(case.learner, lora=LORA)
    with pytest.raises(AdapterError, match=r"outside of the text network .* Set learner\.lora\.targets=\[text\]"):
        require_servable(case.policy.family, everywhere, "vllm")
    require_servable(case.policy.family, everywhere, "hf")
    require_servable(case.policy.family, case.learner, "vllm")
