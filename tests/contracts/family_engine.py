"""Exercises a family's vLLM engine; runs in a separate process, since a process can hold only one engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from othink_ray.config.schema import ModelConfig, RolloutConfig
from othink_ray.engines.base import Sampling
from othink_ray.types import Group, Probe, Prompt
from othink_ray.weights import Bucket, digests, from_buckets

SAMPLING = Sampling(answers=2, max_tokens=6, temperature=1.0, seed=3)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lived:
    """Frozen record of an engine's groups before and after a push, and of the weights that the push changed."""

    opened: Sequence[Group]
    pushed: Sequence[Group]
    moved: dict[str, int]  # weight name -> number of engine elements changed by its transfer
    kept: dict[str, int]  # engine parameter -> number of elements that the push did not change
    wrong: dict[str, str]  # digest mismatches after the push
    wrong_by_a_bit: dict[str, str]  # mismatches when one bit of each expected weight is flipped
    probes: Sequence[Probe]  # after the push


def live(
    model: ModelConfig, rollout: RolloutConfig, path: str, prompts: Sequence[Prompt], weights: Sequence[Bucket]
) -> Lived:
    """Open `path`, generate, push `weights` (one bucket per weight), and generate again."""
    from othink_ray.engines.vllm_rollout import VLLMRollout
    from othink_ray.families import open_family
    from tests.engines.samples import worker_of

    family = open_family(model, path)
    engine = VLLMRollout(rollout, model, family, path, transport="shared_memory", max_logprobs=20)
    opened = list(engine.generate(prompts, SAMPLING))
    parameters = dict(worker_of(engine).network.named_parameters())
    start = {name: weight.clone() for name, weight in parameters.items()}
    moved: dict[str, int] = {}
    engine.begin_push()
    for bucket in weights:
        before = {name: weight.clone() for name, weight in parameters.items()}
        engine.load_weights(from_buckets([bucket]))
        [spec] = bucket.specs
        moved[spec.name] = sum(int((weight != before[name]).sum()) for name, weight in parameters.items())
    engine.finish_push(1, buckets=len(weights))
    whole = dict(from_buckets(weights))
    pushed = list(engine.generate(prompts, SAMPLING))
    wrong = engine.check_weights(digests(whole.items()), complete=True)
    for weight in whole.values():
        weight.view(-1)[-1:].view(torch.int32).bitwise_xor_(1)
    return Lived(
        opened=opened,
        pushed=pushed,
        moved=moved,
        kept={name: int((weight == start[name]).sum()) for name, weight in parameters.items()},
        wrong=wrong,
        wrong_by_a_bit=engine.check_weights(digests(whole.items()), complete=False),
        probes=engine.probe(prompts, replace(SAMPLING, answers=1), 8),
    )


def probe_before_and_after(
    model: ModelConfig, rollout: RolloutConfig, path: str, prompts: Sequence[Prompt], weights: Sequence[Bucket]
) -> tuple[list[Probe], list[Probe]]:
    """Return probes of `path` before and after a push of `weights`."""
    from othink_ray.engines.vllm_rollout import VLLMRollout
    from othink_ray.families import open_family

    engine = VLLMRollout(rollout, model, open_family(model, path), path, transport="shared_memory", max_logprobs=8)
    sampling = Sampling(answers=1, max_tokens=6, temperature=1.0, seed=0)
    before = engine.probe(prompts, sampling, 8)
    engine.begin_push()
    for bucket in weights:
        engine.load_weights(from_buckets([bucket]))
    engine.finish_push(1, buckets=len(weights))
    return before, engine.probe(prompts, sampling, 8)
