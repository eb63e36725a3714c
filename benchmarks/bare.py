"""One engine in a process, without Ray or loop:  python -m benchmarks.bare PART OVERRIDE ...  (a key of PARTS)

It says of each of `train.steps` steps, as JSON, when it began and the seconds that it took.
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
from othink_ray.data import PromptStream, open_training
from othink_ray.driver.build import learner_engine, open_sft_workers, recipe, rollout_engine
from othink_ray.driver.console import Console
from othink_ray.driver.warm_start import base_model
from othink_ray.engines.base import RendezvousInfo, RolloutEngine, Sampling, rendezvous_info
from othink_ray.engines.products import multiply
from othink_ray.families import open_family
from othink_ray.types import Completion, Group, Pack, Prompt, ScoredGroup


def main(part: str, overrides: Sequence[str]) -> None:
    config, path, stream = opened(overrides)
    turn = PARTS[part](config, path)
    for _ in range(config.train.steps):
        prompts = stream.take(config.train.prompts_per_step)
        began = time.time()
        print(json.dumps({"began": began, "seconds": turn(prompts)}), flush=True)


def opened(overrides: Sequence[str]) -> tuple[Config, str, PromptStream]:
    """The run's settings, its model's folder and its questions."""
    config, found = read(overrides)
    assert config is not None and not found, found
    with Console() as console:
        path = base_model(config, console, open_sft_workers)
    return config, path, PromptStream(open_training(config.data), seed=config.train.seed, on_bad_row="stop")


def generating(config: Config, path: str) -> Callable[[Sequence[Prompt]], float]:
    return _sampling(rollout_engine(config, path), config)


def generating_products(config: Config, path: str) -> Callable[[Sequence[Prompt]], float]:
    """Time the matrix products of one vLLM sampling step, replayed alone: same kernels, shapes and order."""
    engine: Any = rollout_engine(config, path)
    [layers] = engine.engine.collective_rpc(lambda worker: [layer for _, layer in worker.packed])
    kernels = [layer.cpu_linear for layer in layers]
    made: list[tuple[int, Tensor, Tensor | None]] = []  # index of a layer, a random input, its bias

    def sample_once(prompts: Sequence[Prompt]) -> None:
        inputs: dict[torch.Size, Tensor] = {}

        def recorded(index: int, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            made.append((index, inputs.setdefault(x.shape, torch.rand_like(x)), bias))
            product: Tensor = kernels[index](x, weight, bias)
            return product

        for index, layer in enumerate(layers):
            layer.cpu_linear = partial(recorded, index)
        _sampling(engine, config)(prompts)
        for layer, kernel in zip(layers, kernels, strict=True):
            layer.cpu_linear = kernel

    def turn(prompts: Sequence[Prompt]) -> float:
        if not made:
            sample_once(prompts)
        start = time.perf_counter()
        for index, x, bias in made:
            kernels[index](x, layers[index].weight, bias)
        return time.perf_counter() - start

    return turn


def _sampling(engine: RolloutEngine, config: Config) -> Callable[[Sequence[Prompt]], float]:
    sampling = Sampling(
        answers=config.algo.group_size,
        max_tokens=config.rollout.max_tokens,
        temperature=config.rollout.temperature,
        seed=config.train.seed,
    )

    def turn(prompts: Sequence[Prompt]) -> float:
        engine.begin_push()  # what it keeps of earlier steps is of older weights in a run
        engine.finish_push(0, 0)
        start = time.perf_counter()
        for _ in engine.generate(prompts, sampling):
            pass
        return time.perf_counter() - start

    return turn


def learning(config: Config, path: str) -> Callable[[Sequence[Prompt]], float]:
    meeting = rendezvous_info()
    place = RendezvousInfo(rank=0, world_size=1, master_address="127.0.0.1", master_port=meeting.port)
    engine = learner_engine(config, path, place, with_reference=True)
    own, answers = recipe(config), random_answers(config, path)

    def turn(prompts: Sequence[Prompt]) -> float:
        scored = answers(prompts)
        rewards, valid = np.stack([one.rewards for one in scored]), np.stack([one.valid for one in scored])
        packs = own.pack(scored, list(own.advantages(rewards, valid)))
        [[micro_batches]] = plan(packs, ranks=1, updates=1, micro_tokens=config.learner.micro_tokens)
        batches: list[list[Pack]] = [[packs[index] for index in rows] for rows in micro_batches]
        lr, loss = config.learner.lr, config.algo.loss
        start = time.perf_counter()
        engine.update([batches], beta=config.algo.kl.beta_min, lr=lr, loss=loss, correction="none")
        return time.perf_counter() - start

    return turn


def learning_products(config: Config, path: str) -> Callable[[Sequence[Prompt]], float]:
    """Time the matrix products of one update, without those of attention, replayed alone by the learner's kernel."""
    plain = replace(config.learner, onednn=False, compile=False, attention="grouped")  # products that torch dispatches
    learn_once, made = learning(replace(config, learner=plain), path), Products()

    def turn(prompts: Sequence[Prompt]) -> float:
        if not made.factors:
            with made:
                learn_once(prompts)
        start = time.perf_counter()
        for left, right, added in made.factors:
            multiply(left, right, added)
        return time.perf_counter() - start

    return turn


class Products(TorchDispatchMode):
    """Notes random factors that lie in memory as those of each product do; factors of a shape are noted as one."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.factors: list[tuple[Tensor, Tensor, Tensor | None]] = []
        self.drawn: dict[tuple[torch.Size, bool], Tensor] = {}

    def __torch_dispatch__(self, function: Any, types: Any, given: Any = (), named: Any = None) -> Any:
        if function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            *added, left, right = given
            self.factors.append((self._like(left), self._like(right), torch.rand_like(added[0]) if added else None))
        return function(*given, **(named or {}))

    def _like(self, factor: Tensor) -> Tensor:
        kind = factor.shape, factor.is_contiguous()
        if kind not in self.drawn:
            self.drawn[kind] = torch.rand(factor.shape) if factor.is_contiguous() else torch.rand(factor.mT.shape).mT
        return self.drawn[kind]


def learning_on_padded_rows(config: Config, path: str) -> Callable[[Sequence[Prompt]], float]:
    step, answers = learning_padded(config, path), random_answers(config, path)

    def turn(prompts: Sequence[Prompt]) -> float:
        scored = answers(prompts)
        gains = [float(gain) for one in scored for gain in one.rewards - one.rewards.mean()]
        return step([one.group for one in scored], gains)

    return turn


def random_answers(config: Config, path: str) -> Callable[[Sequence[Prompt]], list[ScoredGroup]]:
    """Answers of random tokens, randomly rewarded: as much work as any others."""
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
        asked = family.expand(family.prompt_token_ids(prompt), family.image_token_counts(prompt.images))
        group = Group(prompt=prompt, prompt_token_ids=np.array(asked), completions=completions, version=0)
        return ScoredGroup(group=group, rewards=rng.random(answers), parts={}, valid=np.ones(answers, dtype=bool))

    return lambda prompts: [answer(prompt) for prompt in prompts]


PARTS = {
    "generate": generating,
    "generate_products": generating_products,
    "learn": learning,
    "learn_products": learning_products,
    "learn_padded": learning_on_padded_rows,
}


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
