"""What the pools promise: order, masks and named failures."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
import ray

from othink_ray.config.schema import Config
from othink_ray.driver.loop import in_order
from othink_ray.engines.base import Sampling
from othink_ray.runtime.cluster import ClusterError
from othink_ray.runtime.placement import Placement, Seat
from othink_ray.runtime.pools import RewardPool, RolloutPool, WorkerFailed
from othink_ray.runtime.team import Team
from othink_ray.types import Completion, Group, Prompt

SAMPLING = Sampling(answers=2, max_tokens=4, temperature=1.0, seed=0)


class Echo:
    """A rollout engine that answers with the prompt's own id, or does what the id says."""

    version = 0

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[Group]:
        for prompt in prompts:
            if prompt.task == "die":
                os._exit(1)
            if prompt.task == "fail":
                raise ValueError("no answer to this one")
            ids = np.arange(2, dtype=np.int64)
            completion = Completion(token_ids=ids, sampler_logprobs=np.zeros(2, np.float32), text="", finish="stop")
            yield Group(
                prompt=prompt, prompt_token_ids=ids, completions=(completion,) * sampling.answers, version=self.version
            )


@pytest.fixture
def echoes(ray_here: None, team_config: Config) -> Iterator[RolloutPool]:
    seats = [Seat(role="rollout", cpus=0.1, gpus=0)] * 2
    rollout = replace(team_config.rollout, num_actors=2, step_timeout_s=20)
    with Placement(seats, "PACK", 30) as placement:
        yield RolloutPool(Echo, rollout, placement)  # type: ignore[arg-type]


def asked_for(prompts: Sequence[Prompt], task: str) -> list[Prompt]:
    return [replace(prompts[0], id=f"{task}-0", task=task), *prompts[1:]]


def test_every_prompt_is_answered_once_whichever_actor_answers(echoes: RolloutPool, asked: list[Prompt]) -> None:
    groups: list[Group] = ray.get(list(echoes.generate(asked, SAMPLING)))
    assert sorted(group.prompt.id for group in groups) == sorted(prompt.id for prompt in asked)


def test_an_engine_that_fails_is_named_with_its_cause(
    echoes: RolloutPool, team_config: Config, asked: list[Prompt]
) -> None:
    rewards = RewardPool(team_config.algo.reward)
    with pytest.raises(WorkerFailed, match="no answer to this one"):
        rewards.score(echoes.generate(asked_for(asked, "fail"), SAMPLING))


def test_an_engine_that_dies_is_an_error_and_not_a_hang(
    echoes: RolloutPool, team_config: Config, asked: list[Prompt]
) -> None:
    rewards = RewardPool(team_config.algo.reward)
    started = time.monotonic()
    with pytest.raises(WorkerFailed, match="died"):
        rewards.score(echoes.generate(asked_for(asked, "die"), SAMPLING))
    assert time.monotonic() - started < 30


def test_a_hanging_grader_is_killed_and_its_group_masked(team: Team, asked: list[Prompt]) -> None:
    pool = RewardPool(team.rewards.reward)
    [actor] = pool.actors
    groups = list(team.generate(asked[:1], 0))
    actor.__ray_call__.remote(lambda self: time.sleep(3600))
    [scored] = pool.score(groups)
    assert not scored.valid.any()
    [again] = pool.score(groups)
    assert again.valid.all()


def test_a_group_of_bombs_is_over_in_its_time_and_counted(
    ray_here: None, team_config: Config, asked: list[Prompt]
) -> None:
    pool = RewardPool(replace(team_config.algo.reward, answer_cpu_s=0.5, timeout_s=60))
    ids = np.arange(2, dtype=np.int64)
    texts = ["<answer>9^{9^{9^{9}}}</answer>", "<answer>99999999!</answer>", "<answer>\\sqrt[3]{8}</answer>"]
    completions = tuple(
        Completion(token_ids=ids, sampler_logprobs=np.zeros(2, np.float32), text=text, finish="stop") for text in texts
    )
    prompt = replace(asked[0], answer="2")
    group = Group(prompt=prompt, prompt_token_ids=ids, completions=completions, version=0)
    [scored] = pool.score([ray.put(group)])
    assert scored.valid.all()
    assert scored.parts["accuracy"].tolist() == [0, 0, 1]
    assert scored.graded == {"timeout": 2, "symbolic": 1}


def test_scores_come_back_in_the_order_of_the_prompts(team: Team, asked: list[Prompt]) -> None:
    scored = team.score(team.generate(asked, 0))
    assert [one.group.prompt.id for one in in_order(scored, asked)] == [prompt.id for prompt in asked]


def test_a_run_that_does_not_fit_says_what_it_needs(ray_here: None) -> None:
    with pytest.raises(ClusterError, match=r"needs 1000 CPUs and 0 GPUs, the cluster has"):
        Placement([Seat(role="learner", cpus=1000, gpus=0)], "PACK", timeout_s=1)
