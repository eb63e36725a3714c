"""vLLM on the GPU: tokens per second for several image sizes and answer lengths."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from typing import Any

from benchmarks.gpu.rows import Figures, Row, measure_each
from benchmarks.gpu.setup import Setup
from benchmarks.gpu.shapes import questions
from othink_ray.config.schema import RolloutConfig
from othink_ray.engines.base import RolloutEngine, Sampling

# As in conf/rollout/vllm_gpu.yaml and benchmarks.work: CUDA graphs, answers of equal length.
_CHANGES = {"enforce_eager": False, "fixed_length": True, "max_num_seqs": 256}
CANDIDATES = 8


def rollout_config(**changes: Any) -> RolloutConfig:
    """Return the schema's defaults with changes: without Hydra, which may not be installed."""
    return RolloutConfig(**_CHANGES | changes)


def open_engine(setup: Setup, *, transport: str, **changes: Any) -> RolloutEngine:
    """Open vLLM on the setup's model; `changes` override its engine settings."""
    from othink_ray.engines.vllm_rollout import VLLMRollout
    from othink_ray.families import open_family

    model = setup.model()
    assert model.path is not None
    return VLLMRollout(
        rollout_config(**setup.engine, **changes),
        model,
        open_family(model, model.path),
        model.path,
        transport=transport,
        max_logprobs=CANDIDATES,
    )


def generate(setup: Setup) -> Iterator[Row]:
    """Yield a row for opening and warming up the engine, then one per image size and answer length."""
    start = time.perf_counter()
    engine = open_engine(setup, transport="shared_memory")
    _tokens(setup, engine, setup.sides[0], setup.tokens[0])
    yield Row(setting=f"{setup.name} open and warm up", figures={"s": time.perf_counter() - start})
    yield from measure_each(
        (f"{setup.name} {side}x{side} G={setup.answers} T={tokens}", partial(_rate, setup, engine, side, tokens))
        for side in setup.sides
        for tokens in setup.tokens
    )


def _rate(setup: Setup, engine: RolloutEngine, side: int, tokens: int) -> Figures:
    engine.begin_push()  # an empty push drops cached prefixes
    engine.finish_push(0, 0)
    start = time.perf_counter()
    generated = _tokens(setup, engine, side, tokens)
    seconds = time.perf_counter() - start
    return {"tokens/s": generated / seconds, "samples/s": setup.prompts * setup.answers / seconds, "s": seconds}


def _tokens(setup: Setup, engine: RolloutEngine, side: int, tokens: int) -> int:
    """Generate, and return the number of tokens; every answer must have exactly `tokens`."""
    sampling = Sampling(answers=setup.answers, max_tokens=tokens, temperature=1.0, seed=0)
    lengths = [
        len(answer.token_ids)
        for group in engine.generate(questions(setup.prompts, side), sampling)
        for answer in group.completions
    ]
    if set(lengths) != {tokens}:
        raise RuntimeError(
            f"answers have {sorted(set(lengths))} tokens, must have {tokens}: rollout.fixed_length has no effect"
        )
    return sum(lengths)
