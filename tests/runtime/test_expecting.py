"""What comes next is told to the engines that will be asked it, and told early enough."""

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
from othink_ray.runtime.placement import Placement, ProcessSpec
from othink_ray.runtime.rollout_pool import RolloutPool
from othink_ray.types import Completion, Group, Prompt
from tests.runtime.conftest import incidents

SAMPLING = Sampling(answers=2, max_tokens=4, temperature=1.0, seed=0)
LONG = 40  # tokens of every other prompt's answers


class Noting:
    """A rollout engine that notes what it was told, in order; its answers are long for every other prompt."""

    version = 0

    def __init__(self) -> None:
        self.told: list[tuple[str, list[str]]] = []

    def note(self, what: str, prompts: Sequence[Prompt] = ()) -> None:
        self.told.append((what, [prompt.id for prompt in prompts]))

    def prepare(self, prompts: Sequence[Prompt]) -> None:
        self.note("prepare", prompts)
        if any(prompt.task == "refuse" for prompt in prompts):
            raise ValueError("not this one")

    def sleep(self) -> None:
        self.note("sleep")

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[Group]:
        self.note("generate", prompts)
        for prompt in prompts:
            ids = np.arange(LONG if int(prompt.id) % 2 else 1, dtype=np.int64)
            completion = Completion(token_ids=ids, sampler_logprobs=ids.astype(np.float32), text="", finish="stop")
            yield Group(
                prompt=prompt, prompt_token_ids=ids, completions=(completion,) * sampling.answers, version=self.version
            )


def questions(numbers: Sequence[int], task: str = "") -> list[Prompt]:
    return [Prompt(id=str(one), messages=(), images=(b"pixels",), answer="", task=task) for one in numbers]


Pools = Callable[..., RolloutPool]


@pytest.fixture
def pools(ray_here: None, team_config: Config) -> Iterator[Pools]:
    """Two engines each."""
    seats = [(ProcessSpec(role="rollout", cpus=0.1, gpus=0),)] * 2
    with Placement(seats, team_config.cluster, print) as placement:

        def pool(**settings: Any) -> RolloutPool:
            rollout = replace(team_config.rollout, num_actors=2, step_timeout_s=20, **settings)
            made = RolloutPool(Noting, rollout, placement, incidents())  # type: ignore[arg-type]
            made.wait()
            return made

        yield pool


def told(pool: RolloutPool) -> list[list[tuple[str, list[str]]]]:
    """Each engine, since it was asked last."""

    def take(self: Any) -> Any:
        taken, self.engine.told = self.engine.told, []
        return taken

    found: list[list[tuple[str, list[str]]]] = ray.get([actor.__ray_call__.remote(take) for actor in pool.actors])
    return found


def answered(pool: RolloutPool, prompts: list[Prompt]) -> list[Group]:
    groups: list[Group] = ray.get(list(pool.generate(prompts, SAMPLING)))
    assert sorted(group.prompt.id for group in groups) == sorted(prompt.id for prompt in prompts)
    return groups


@pytest.mark.parametrize("balance", [False, True])
def test_each_engine_prepares_what_it_will_be_asked(pools: Pools, balance: bool) -> None:
    pool = pools(balance=balance)
    for start in (0, 10):
        coming = questions(range(start, start + 7))
        pool.prefetch(coming, SAMPLING.answers)
        pool.note(answered(pool, coming))  # balance learns more before the next step than it knew when this was dealt
        for [(first, prepared), (second, asked)] in told(pool):
            assert (first, second, prepared) == ("prepare", "generate", asked)
            assert len(asked) >= 2


def test_others_than_were_expected_are_answered_too(pools: Pools) -> None:
    pool = pools()
    pool.prefetch(questions(range(4)), SAMPLING.answers)
    answered(pool, questions(range(2, 9)))
    assert sorted(name for own in told(pool) for what, names in own if what == "generate" for name in names) == [
        str(number) for number in range(2, 9)
    ]


def test_engines_that_leave_the_device_prepare_after_that(pools: Pools) -> None:
    """The learner waits for the device, and not for what an engine does beside it."""
    pool = pools(sleep=True)
    coming = questions(range(6))
    pool.prefetch(coming, SAMPLING.answers)
    pool.sleep()
    answered(pool, coming)
    assert [[what for what, _ in own] for own in told(pool)] == [["sleep", "prepare", "generate"]] * 2


def test_what_cannot_be_prepared_is_no_failure_until_it_is_asked(pools: Pools) -> None:
    pool = pools()
    coming = questions(range(4), task="refuse")
    pool.prefetch(coming, SAMPLING.answers)
    answered(pool, coming)


def test_an_engine_that_died_meanwhile_is_replaced_and_asked_the_same(pools: Pools) -> None:
    pool = pools()
    coming = questions(range(6))
    pool.prefetch(coming, SAMPLING.answers)
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(pool.actors[1].__ray_call__.remote(lambda self: os._exit(1)))
    answered(pool, coming)
