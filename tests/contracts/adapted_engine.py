"""What a vLLM engine does with pushed adapters: to be run in a process of its own, which can have one engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from othink_ray.config.schema import ModelConfig, RolloutConfig
from othink_ray.engines.base import Sampling, ServedAdapters
from othink_ray.types import Group, Probe, Prompt
from othink_ray.weights.buckets import Chunk, from_chunks, to_chunks

SAMPLING = Sampling(answers=2, max_tokens=16, temperature=1.0, seed=3)
CANDIDATES = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapted:
    """Answers as opened, then what was seen after each push."""

    opened: Sequence[Group]
    pushed: Sequence[Sequence[Group]]
    probes: Sequence[Sequence[Probe]]
    used: Sequence[Chunk]  # what the layers add their factors from, after the last push
    twice: Sequence[str]  # layers that hold their matrix beside the packed copy of it
    refused: str  # what was said to a factor of a layer that is not there


def live(
    model: ModelConfig,
    rollout: RolloutConfig,
    path: str,
    adapters: ServedAdapters,
    prompts: Sequence[Prompt],
    pushes: Sequence[Sequence[Chunk]],
) -> Adapted:
    """Opens `path`, answers, and after each of `pushes` answers again."""
    from othink_ray.engines.vllm_rollout import VLLMRollout
    from othink_ray.families import open_family

    engine = VLLMRollout(
        *(rollout, model, open_family(model, path), path),
        transport="shared_memory",
        max_logprobs=CANDIDATES,
        adapters=adapters,
    )
    opened, pushed, probes = list(engine.generate(prompts, SAMPLING)), [], []
    for version, chunks in enumerate(pushes):
        engine.begin_push()
        for chunk in chunks:
            engine.load_weights(from_chunks([chunk]))
        engine.finish_push(version, buckets=len(chunks))
        pushed.append(list(engine.generate(prompts, SAMPLING)))
        probes.append(engine.probe(prompts, replace(SAMPLING, answers=1), CANDIDATES))
    [used] = engine.engine.collective_rpc("used_factors")
    chunks = list(to_chunks(used.items(), bucket_bytes=2**20))
    [twice] = engine.engine.collective_rpc(_held_twice)
    return Adapted(
        opened=opened, pushed=pushed, probes=probes, used=chunks, twice=twice, refused=_refused(engine, used)
    )


def _held_twice(worker: Any) -> list[str]:
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
