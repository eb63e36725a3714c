"""Time one engine in this process, without Ray or the loop:  python -m benchmarks.bare PART OVERRIDE ...

PART is a key of PARTS. Prints a JSON line for each of `train.steps` steps: its start as Unix time, and its seconds.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.padded import learning_padded
from othink_ray.config.load import read
from othink_ray.config.schema import Config
from othink_ray.core.packing import plan
from othink_ray.cpu.kernels import matmul
from othink_ray.data import PromptStream, open_training
from othink_ray.driver.build import learner_engine, open_sft_session, recipe, rollout_engine
from othink_ray.driver.console import Console
from othink_ray.driver.warm_start import base_model
from othink_ray.engines.base import RendezvousInfo, RolloutEngine, Sampling, rendezvous_store
from othink_ray.families import open_family
from othink_ray.types import Completion, Group, Pack, Prompt, ScoredGroup, UpdateSettings


def main(part: str, overrides: Sequence[str]) -> None:
    config, path, stream = opened(overrides)
    step = PARTS[part](config, path)
    for _ in range(config.train.steps):
        prompts = stream.take(config.train.prompts_per_step)
        began = time.time()
        print(json.dumps({"began": began, "seconds": step(prompts)}), flush=True)


def opened(overrides: Sequence[str]) -> tuple[Config, str, PromptStream]:
    """Return the run's config, its model folder and its prompt stream."""
    config, problems = read(overrides)
    assert config is not None and not problems, problems
    with Console() as console:
        path = base_model(config, console, open_sft_session)
    return config, path, PromptStream(open_training(config.data), seed=config.train.seed, on_bad_row="stop")


def generating(config: Config, path: str) -> Callable[[Sequence[Prompt]], float]:
    return _sampling(rollout_engine(config, path), config)


def generating_matmuls(config: Config, path: str) -> Callable[[Sequence[Prompt]], float]:
    """Time only the matmuls of one vLLM sampling step, replayed with the same kernels, shapes and order."""
    engine: Any = rollout_engine(config, path)
    [layers] = engine.engine.collective_rpc(lambda worker: [layer for _, layer in worker.packed])
    kernels = [layer.cpu_linear for layer in layers]
    calls: list[tuple[int, Tensor, Tensor | None]] = []  # (layer index, random input, bias)

    def sample_once(prompts: Sequence[Prompt]) -> None:
        inputs: dict[torch.Size, Tensor] = {}

        def record(index: int, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            calls.append((index, inputs.setdefault(x.shape, torch.rand_like(x)), bias))
            product: Tensor = kernels[index](x, weight, bias)
            return product

        for index, layer in enumerate(layers):
            layer.cpu_linear = partial(record, index)
        _sampling(engine, config)(prompts)
        for layer, kernel in zip(layers, kernels, strict=True):
            layer.cpu_linear = kernel

    def step(prompts: Sequence[Prompt]) -> float:
        if not calls:
            sample_once(prompts)
        start = time.perf_counter()
        for index, x, bias in calls:
            kernels[index](x, layers[index].weight, bias)
        return time.perf_counter() - start

    return step


def _sampling(engine: RolloutEngine, config: Config) -> Callable[[Sequence[Prompt]], float]:
    sampling = Sampling(
        answers=config.algo.group_size,
        max_tokens=config.rollout.max_tokens,
        temperature=config.rollout.temperature,
        seed=config.train.seed,
    )

    def step(prompts: Sequence[Prompt]) -> float:
        engine.begin_push()  # an empty push drops cached prefixes, as the push before each step of a run does
        engine.finish_push(0, 0)
        start = time.perf_counter()
        for _ in engine.generate(prompts, sampling):
            pass
        return time.perf_counter() - start

    return step


def learning(config: Config, path: str) -> Callable[[Sequence[Prompt]], float]:
    store = rendezvous_store()
    rendezvous = RendezvousInfo(rank=0, world_size=1, master_address="127.0.0.1", master_port=store.port)
    engine = learner_engine(config, path, rendezvous, with_reference=True)
    algorithm, answers = recipe(config), random_answers(config, path)

    def step(prompts: Sequence[Prompt]) -> float:
        scored = answers(prompts)
        rewards, valid = np.stack([group.rewards for group in scored]), np.stack([group.valid for group in scored])
        packs = algorithm.pack(scored, list(algorithm.advantages(rewards, valid)))
        [[micro_batches]] = plan(packs, ranks=1, updates=1, micro_tokens=config.learner.micro_tokens)
        batches: list[list[Pack]] = [[packs[index] for index in indices] for indices in micro_batches]
        settings = UpdateSettings(beta=config.algo.kl.beta_min, lr=config.learner.lr, loss=config.algo.loss, tis="none")
        start = time.perf_counter()
        engine.update([batches], settings)
        return time.perf_counter() - start

    return step


def learning_matmuls(config: Config, path: str) -> Callable[[Sequence[Prompt]], float]:
    """Time only the matmuls of one update, except those of attention, replayed with the learner's kernel."""
    plain = replace(config.learner, onednn=False, compile=False, attention="grouped")  # so that torch dispatches them
    learn_once, recorder = learning(replace(config, learner=plain), path), MatmulRecorder()

    def step(prompts: Sequence[Prompt]) -> float:
        if not recorder.operands:
            with recorder:
                learn_once(prompts)
        start = time.perf_counter()
        for left, right, added in recorder.operands:
            matmul(left, right, added)
        return time.perf_counter() - start

    return step


class MatmulRecorder(TorchDispatchMode):
    """Records, for each matmul, random operands of the same shape and layout; equal factors share one tensor."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operands: list[tuple[Tensor, Tensor, Tensor | None]] = []
        self.random: dict[tuple[torch.Size, bool], Tensor] = {}

    def __torch_dispatch__(self, function: Any, types: Any, given: Any = (), named: Any = None) -> Any:
        if function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            *added, left, right = given
            self.operands.append((self._like(left), self._like(right), torch.rand_like(added[0]) if added else None))
        return function(*given, **(named or {}))

    def _like(self, operand: Tensor) -> Tensor:
        layout = operand.shape, operand.is_contiguous()
        if layout not in self.random:
            self.random[layout] = torch.rand(operand.shape) if layout[1] else torch.rand(operand.mT.shape).mT
        return self.random[layout]


def learning_on_padded_samples(config: Config, path: str) -> Callable[[Sequence[Prompt]], float]:
    update, answers = learning_padded(config, path), random_answers(config, path)

    def step(prompts: Sequence[Prompt]) -> float:
        scored = answers(prompts)
        advantages = [float(value) for group in scored for value in group.rewards - group.rewards.mean()]
        return update([group.group for group in scored], advantages)

    return step


def random_answers(config: Config, path: str) -> Callable[[Sequence[Prompt]], list[ScoredGroup]]:
    """Return a sampler of random tokens with random rewards; such answers cost a learner as much as real ones."""
    family, rng = open_family(config.model, path), np.random.default_rng(0)
    tokens, answers = config.rollout.max_tokens, config.algo.group_size

    def answer(prompt: Prompt) -> ScoredGroup:
        completions = tuple(
            Completion(
                token_ids=rng.integers(32, 256, tokens),
                sampler_logprobs=np.full(tokens, -5.0, dtype=np.float32),
                text="",
                finish="length",
            )
            for _ in range(answers)
        )
        prompt_ids = family.expand(family.prompt_token_ids(prompt), family.image_token_counts(prompt.images))
        group = Group(prompt=prompt, prompt_token_ids=np.array(prompt_ids), completions=completions, version=0)
        return ScoredGroup(group=group, rewards=rng.random(answers), parts={}, valid=np.ones(answers, dtype=bool))

    return lambda prompts: [answer(prompt) for prompt in prompts]


PARTS = {
    "generate": generating,
    "generate_matmuls": generating_matmuls,
    "learn": learning,
    "learn_matmuls": learning_matmuls,
    "learn_padded": learning_on_padded_samples,
}


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
