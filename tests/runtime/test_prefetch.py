"""Prefetch of the next prompts: each engine prepares the shard that it will sample, early enough."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import ray

from othink_ray.config.schema import Config
from othink_ray.engines.base import Sampling
from othink_ray.runtime.bundles import ProcessSpec
from othink_ray.runtime.placement import Placement
from othink_ray.runtime.rollout_pool import RolloutPool
from othink_ray.types import Completion, Group, Prompt
from tests.runtime.conftest import incidents

SAMPLING = Sampling(answers=2, max_tokens=4, temperature=1.0, seed=0)
LONG = 40  # tokens of every other prompt's answers


class RecordingEngine:
    """A rollout engine that records its calls in order; its answers are long for every other prompt."""

    version = 0

    def __init__(self) -> None:
        self.calls: list[tuple[str, list[str]]] = []

    def record(self, call: str, prompts: Sequence[Prompt] = ()) -> None:
        self.calls.append((call, [prompt.id for prompt in prompts]))

    def prefetch(self, prompts: Sequence[Prompt]) -> None:
        self.record("prefetch", prompts)
        if any(prompt.task == "refuse" for prompt in prompts):
            raise ValueError("cannot prepare this prompt")

    def sleep(self) -> None:
        self.record("sleep")

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[Group]:
        self.record("generate", prompts)
        for prompt in prompts:
            ids = np.arange(LONG if int(prompt.id) % 2 else 1, dtype=np.int64)
            completion = Completion(token_ids=ids, sampler_logprobs=ids.astype(np.float32), text="", finish="stop")
            yield Group(
                prompt=prompt, prompt_token_ids=ids, completions=(completion,) * sampling.answers, version=self.version
            )


def numbered(numbers: Sequence[int], task: str = "") -> list[Prompt]:
    return [Prompt(id=str(number), messages=(), images=(b"pixels",), answer="", task=task) for number in numbers]


Pools = Callable[..., RolloutPool]


@pytest.fixture
def pools(ray_here: None, workers_config: Config) -> Iterator[Pools]:
    """Open pools of two recording engines."""
    bundles = [(ProcessSpec(role="rollout", cpus=0.1, gpus=0),)] * 2
    with Placement(bundles, workers_config.cluster, print) as placement:

        def pool(**settings: Any) -> RolloutPool:
            rollout = replace(workers_config.rollout, num_actors=2, step_timeout_s=20, **settings)
            opened = RolloutPool(RecordingEngine, rollout, placement, incidents())  # type: ignore[arg-type]
            opened.wait()
            return opened

        yield pool


def recorded(pool: RolloutPool) -> list[list[tuple[str, list[str]]]]:
    """Return and clear each engine's calls."""

    def take(self: Any) -> Any:
        taken, self.engine.calls = self.engine.calls, []
        return taken

    found: list[list[tuple[str, list[str]]]] = ray.get([actor.__ray_call__.remote(take) for actor in pool.actors])
    return found


def sample(pool: RolloutPool, prompts: list[Prompt]) -> list[Group]:
    """Return the groups of the prompts; each prompt is answered once."""
    groups: list[Group] = ray.get(list(pool.generate(prompts, SAMPLING)))
    assert sorted(group.prompt.id for group in groups) == sorted(prompt.id for prompt in prompts)
    return groups


@pytest.mark.parametrize("balance", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_each_engine_prefetches_the_prompts_that_it_samples(pools: Pools, balance: bool) -> None:
    pool = pools(balance=balance)
    for start in (0, 10):
        upcoming = numbered(range(start, start + 7))
        pool.prefetch(upcoming, SAMPLING.answers)
        pool.record_lengths(sample(pool, upcoming))  # new lengths would change the balance after the prefetch
        for [(first, prepared), (second, sampled)] in recorded(pool):
            assert (first, second, prepared) == ("prefetch", "generate", sampled)
            assert len(sampled) >= 2


@pytest.mark.slow
def test_prompts_that_were_not_prefetched_are_answered_too(pools: Pools) -> None:
    pool = pools()
    pool.prefetch(numbered(range(4)), SAMPLING.answers)
    sample(pool, numbered(range(2, 9)))
    assert sorted(
        name for calls in recorded(pool) for call, names in calls if call == "generate" for name in names
    ) == [str(number) for number in range(2, 9)]


@pytest.mark.slow
def test_engines_that_sleep_prefetch_after_leaving_the_device(pools: Pools) -> None:
    """The learner waits for the device, but not for the preparation, which needs none."""
    pool = pools(sleep=True)
    upcoming = numbered(range(6))
    pool.sleep()
    pool.prefetch(upcoming, SAMPLING.answers)
    sample(pool, upcoming)
    assert [[call for call, _ in calls] for calls in recorded(pool)] == [["sleep", "prefetch", "generate"]] * 2


@pytest.mark.slow
def test_a_failed_prefetch_does_not_fail_the_pool(pools: Pools) -> None:
    pool = pools()
    upcoming = numbered(range(4), task="refuse")
    pool.prefetch(upcoming, SAMPLING.answers)
    sample(pool, upcoming)


def test_an_engine_that_died_is_replaced_and_samples_its_shard(pools: Pools) -> None:
    pool = pools()
    upcoming = numbered(range(6))
    pool.prefetch(upcoming, SAMPLING.answers)
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(pool.actors[1].__ray_call__.remote(lambda self: os._exit(1)))
    sample(pool, upcoming)
