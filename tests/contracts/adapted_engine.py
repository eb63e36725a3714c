"""Run a vLLM engine with pushed adapters, in a separate process: a process can have only one engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from othink_ray.config.schema import ModelConfig, RolloutConfig
from othink_ray.engines.base import Sampling, ServedAdapters
from othink_ray.types import Group, Probe, Prompt
from othink_ray.weights import Bucket, from_buckets, to_buckets

SAMPLING = Sampling(answers=2, max_tokens=16, temperature=1.0, seed=3)
CANDIDATES = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapted:
    """Answers of the opened engine, then the results after each push."""

    opened: Sequence[Group]
    pushed: Sequence[Sequence[Group]]
    probes: Sequence[Sequence[Probe]]
    used: Sequence[Bucket]  # factors in use after the last push
    unpacked: Sequence[str]  # layers that hold their matrix beside its packed copy
    refused: str  # error message for a factor of a missing layer


def run(
    model: ModelConfig,
    rollout: RolloutConfig,
    path: str,
    adapters: ServedAdapters,
    prompts: Sequence[Prompt],
    pushes: Sequence[Sequence[Bucket]],
) -> Adapted:
    """Open an engine on `path` and sample answers, then again after each of `pushes`."""
    from othink_ray.engines.vllm_rollout import VLLMRollout
    from othink_ray.families import open_family

    engine = VLLMRollout(
        *(rollout, model, open_family(model, path), path),
        transport="shared_memory",
        max_logprobs=CANDIDATES,
        adapters=adapters,
    )
    opened, pushed, probes = list(engine.generate(prompts, SAMPLING)), [], []
    for version, buckets in enumerate(pushes):
        engine.begin_push()
        for bucket in buckets:
            engine.load_weights(from_buckets([bucket]))
        engine.finish_push(version, buckets=len(buckets))
        pushed.append(list(engine.generate(prompts, SAMPLING)))
        probes.append(engine.probe(prompts, replace(SAMPLING, answers=1), CANDIDATES))
    [used] = engine.engine.collective_rpc("used_factors")
    buckets = list(to_buckets(used.items(), bucket_bytes=2**20))
    [unpacked] = engine.engine.collective_rpc(_unpacked)
    return Adapted(
        opened=opened, pushed=pushed, probes=probes, used=buckets, unpacked=unpacked, refused=_refused(engine, used)
    )


def _unpacked(worker: Any) -> list[str]:
    named = worker.model_runner.get_model().named_modules()
    return [name for name, module in named if hasattr(module, "cpu_linear") and module.weight.numel()]


def _refused(engine: object, used: dict[str, Tensor]) -> str:
    name, factor = next(iter(used.items()))
    try:
        engine.begin_push()  # type: ignore[attr-defined]
        engine.load_weights([(name.replace(".0.", ".99.", 1), factor)])  # type: ignore[attr-defined]
    except Exception as error:
        return str(error)
    return ""
