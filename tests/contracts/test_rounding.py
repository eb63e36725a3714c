"""In bfloat16, engine and learner round alike: the logprob gap of each family, before and after a push."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

from othink_ray.config.schema import Config, ModelConfig
from othink_ray.core.attention import attention_for
from othink_ray.cpu import kernels
from othink_ray.engines.collate import collate
from othink_ray.engines.policy import Policy
from othink_ray.families import FAMILIES, open_family
from othink_ray.families.base import Family
from othink_ray.types import Audit, Probe, Prompt
from othink_ray.weights import compare, repeated, to_buckets
from tests.contracts.family_engine import probe_before_and_after
from tests.engines.samples import MIXED, distributions, row_of, sent_weights
from tests.families.checkpoints import build_checkpoint

pytestmark = pytest.mark.slow

# Mean gaps in nats of these checkpoints without the rounding patches.
UNALIKE = {"qwen2_vl": 0.0353, "qwen2_5_vl": 0.0083, "qwen3_vl": 0.0397, "internvl": 0.0420}

# The attention kernel that is bit-identical to vLLM's needs AVX-512. Without it, another order of summation flips
# single bits, and over the layers these grow to nearly the gap of independent rounding.
SMALLER = 5 if kernels.attention_is_faster() and kernels.attention_kernel().part() == 32 else 1

Probes = tuple[list[Probe], list[Probe]]


@pytest.fixture(scope="module")
def prompts(scenes: Sequence[Prompt]) -> list[Prompt]:
    return [*MIXED, *scenes[:11]]


@pytest.fixture(scope="module")
def policies(config: Config, texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Policy]:
    """Return the learner's bfloat16 policy of each family before training."""
    opened = {}
    for name in FAMILIES:
        folder = tmp_path_factory.mktemp(name)
        build_checkpoint(name, folder, texts)
        opened[name] = _policy(_half(config, name, folder))
    return opened


@pytest.fixture(scope="module")
def trained(policies: dict[str, Policy]) -> dict[str, Policy]:
    """Return the same policies with noise added to every parameter."""
    moved = {name: copy.deepcopy(policy) for name, policy in policies.items()}
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for policy in moved.values():
            for parameter in policy.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise * 0.3 * parameter.float().std())
    return moved


@pytest.fixture(scope="module")
def probes(
    config: Config, policies: dict[str, Policy], trained: dict[str, Policy], prompts: list[Prompt]
) -> Iterator[dict[str, Future[Probes]]]:
    """Probe bfloat16 vLLM engines, two at a time, before and after a push of the trained weights."""
    with ProcessPoolExecutor(2, mp_context=get_context("spawn"), max_tasks_per_child=1) as processes:
        futures = {}
        for name, policy in policies.items():
            path = Path(policy.family.path)  # type: ignore[attr-defined]
            weights = list(to_buckets(sent_weights(trained[name].network), bucket_bytes=2**20))
            model = _half(config, name, path)
            futures[name] = processes.submit(probe_before_and_after, model, config.rollout, str(path), prompts, weights)
        yield futures


@pytest.mark.parametrize("name", FAMILIES)
def test_an_engine_rounds_as_the_learner(
    name: str, policies: dict[str, Policy], probes: dict[str, Future[Probes]]
) -> None:
    opened, _ = probes[name].result()
    assert _gap(policies[name], opened).gap_mean <= UNALIKE[name] / SMALLER


@pytest.mark.parametrize("name", FAMILIES)
def test_an_engine_rounds_as_the_learner_after_a_push(
    name: str, policies: dict[str, Policy], trained: dict[str, Policy], probes: dict[str, Future[Probes]]
) -> None:
    """This includes the float32 head, tied or not."""
    _, pushed = probes[name].result()
    assert _gap(trained[name], pushed).gap_mean <= UNALIKE[name] / SMALLER
    assert _gap(policies[name], pushed).gap_mean > 10 * UNALIKE[name]
    stale = copy.deepcopy(trained[name])
    head = policies[name].family.output_weight(policies[name].network)
    with torch.no_grad():
        stale.network.lm_head.weight = torch.nn.Parameter(head.clone())  # type: ignore[union-attr]
    assert _gap(stale, pushed).gap_mean > UNALIKE[name]


def _half(config: Config, family: str, folder: Path) -> ModelConfig:
    return replace(config.model, family=family, path=str(folder), tiny=None, dtype="bfloat16")


def _policy(model: ModelConfig) -> Policy:
    family: Family = open_family(model, str(model.path))
    return Policy(family.load_network(torch.bfloat16), family, 1.0, logit_rows=64).eval()


def _gap(policy: Policy, probes: Sequence[Probe]) -> Audit:
    """Compare logprobs over the likeliest tokens, as the audit of a push does."""
    cpu = torch.device("cpu")
    known = []
    for probe in probes:
        batch = collate([row_of(probe.group)], policy.family, attention_for("auto", cpu), cpu)
        with torch.no_grad():
            logprobs = distributions(policy, batch)
        known.append(logprobs.gather(1, torch.from_numpy(probe.candidates)).numpy())
    return compare(probes, repeated(probes, known), 0)


def used_kernels(chosen: Sequence[str]) -> list[str]:
    from othink_ray.engines import vllm_patches

    used = []
    for name in chosen:
        vllm_patches._choose_kernel = lambda *shape, name=name: name
        used.append(vllm_patches._choose_vector_kernel(torch.bfloat16, 32, 64))
    return used


def test_half_precision_attention_never_uses_amx() -> None:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as alone:  # the patch is permanent in its process
        assert alone.submit(used_kernels, ["amx", "vec", "vec16"]).result() == ["vec", "vec", "vec16"]
