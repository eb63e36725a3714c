"""vLLM on the GPU: tokens a second, for images and answers of some sizes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from benchmarks.gpu.rows import Figures, Row, each
from benchmarks.gpu.setup import Setup
from benchmarks.gpu.shapes import questions
from othink_ray.config.schema import RolloutConfig
from othink_ray.engines.base import RolloutEngine, Sampling

_CONF = Path(__file__).parents[3] / "conf/rollout/vllm.yaml"
# As conf/rollout/vllm_gpu.yaml and bench.work set them: CUDA graphs, answers of one length.
_CHANGES = {"enforce_eager": False, "fixed_length": True, "max_num_seqs": 256}
CANDIDATES = 8


def rollout_config(**changes: Any) -> RolloutConfig:
    """Of conf/rollout, read without Hydra, which a machine may not have."""
    return RolloutConfig(**yaml.safe_load(_CONF.read_text()) | _CHANGES | changes)


def open_engine(setup: Setup, *, transport: str, **changes: Any) -> RolloutEngine:
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
    """The first row says how long it takes to open the engine and to answer for the first time."""
    start = time.perf_counter()
    engine = open_engine(setup, transport="shared_memory")
    _tokens(setup, engine, setup.sides[0], setup.tokens[0])
    yield Row(setting=f"{setup.name} open and warm up", figures={"s": time.perf_counter() - start})
    yield from each(
        (f"{setup.name} {side}x{side} G={setup.answers} T={tokens}", partial(_rate, setup, engine, side, tokens))
        for side in setup.sides
        for tokens in setup.tokens
    )


def _rate(setup: Setup, engine: RolloutEngine, side: int, tokens: int) -> Figures:
    engine.begin_push()  # what it keeps of earlier answers is forgotten
    engine.finish_push(0, 0)
    start = time.perf_counter()
    generated = _tokens(setup, engine, side, tokens)
    seconds = time.perf_counter() - start
    return {"tokens/s": generated / seconds, "samples/s": setup.asked * setup.answers / seconds, "s": seconds}


def _tokens(setup: Setup, engine: RolloutEngine, side: int, tokens: int) -> int:
    """How many were generated; each answer must have all of its own."""
    sampling = Sampling(answers=setup.answers, max_tokens=tokens, temperature=1.0, seed=0)
    lengths = [
        len(answer.token_ids)
        for group in engine.generate(questions(setup.asked, side), sampling)
        for answer in group.completions
    ]
    if set(lengths) != {tokens}:
        raise RuntimeError(f"answers of {sorted(set(lengths))} tokens, not of {tokens}: rollout.fixed_length")
    return sum(lengths)
