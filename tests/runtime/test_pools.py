"""Pools: order of results, masked answers, restarts and named failures."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from othink_ray.config.schema import Config
from othink_ray.driver.loop import in_prompt_order
from othink_ray.engines.base import Sampling
from othink_ray.runtime import placement
from othink_ray.runtime.bundles import ProcessSpec
from othink_ray.runtime.cluster import ClusterError
from othink_ray.runtime.futures import ProcessLost, WorkerFailed
from othink_ray.runtime.placement import Placement
from othink_ray.runtime.reward_pool import RewardPool
from othink_ray.runtime.rollout_pool import RolloutPool
from othink_ray.runtime.worker_group import WorkerGroup
from othink_ray.types import Completion, Group, Prompt
from tests.runtime.conftest import incidents

SAMPLING = Sampling(answers=2, max_tokens=4, temperature=1.0, seed=0)


class Echo:
    """A rollout engine that answers each prompt, or fails as its task says: once, by a marker file per prompt."""

    version = 0

    def __init__(self, markers: Path) -> None:
        self.markers = markers

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[Group]:
        for prompt in prompts:
            marker = self.markers / prompt.id
            if prompt.task == "fail":
                raise ValueError("cannot answer this prompt")
            if prompt.task in ("die", "hang", "die always") and not marker.exists():
                if prompt.task != "die always":
                    marker.touch()
                if prompt.task == "hang":
                    time.sleep(3600)
                os._exit(1)
            ids = np.arange(2, dtype=np.int64)
            completion = Completion(token_ids=ids, sampler_logprobs=np.zeros(2, np.float32), text="", finish="stop")
            yield Group(
                prompt=prompt, prompt_token_ids=ids, completions=(completion,) * sampling.answers, version=self.version
            )


@pytest.fixture
def echoes(ray_here: None, workers_config: Config, tmp_path: Path) -> Iterator[RolloutPool]:
    bundles = [(ProcessSpec(role="rollout", cpus=0.1, gpus=0),)] * 2
    rollout = replace(workers_config.rollout, num_actors=2, step_timeout_s=3)
    with Placement(bundles, workers_config.cluster, print) as placement:
        pool = RolloutPool(partial(Echo, tmp_path), rollout, placement, incidents(max_restarts=2))  # type: ignore[arg-type]
        pool.wait()
        yield pool


def with_task(prompts: Sequence[Prompt], task: str, index: int = 0) -> list[Prompt]:
    """Return the prompts with this task on the one at `index`."""
    return [replace(each, id=f"{task}-0", task=task) if at == index else each for at, each in enumerate(prompts)]


def test_every_prompt_is_answered_once_by_any_actor(echoes: RolloutPool, prompts: list[Prompt]) -> None:
    groups: list[Group] = ray.get(list(echoes.generate(prompts, SAMPLING)))
    assert sorted(group.prompt.id for group in groups) == sorted(prompt.id for prompt in prompts)


def test_a_failing_engine_is_named_and_not_restarted(echoes: RolloutPool, prompts: list[Prompt]) -> None:
    with pytest.raises(WorkerFailed, match="cannot answer this prompt"):
        list(echoes.generate(with_task(prompts, "fail"), SAMPLING))
    assert echoes.incidents.restarts == 0


@pytest.mark.parametrize(("task", "index"), [("die", 2), pytest.param("hang", 0, marks=pytest.mark.slow)])
def test_a_lost_engine_is_replaced_and_its_prompts_resampled(
    echoes: RolloutPool, prompts: list[Prompt], task: str, index: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """At index 2 the engine is lost after its first group, which is not sampled again."""
    before = echoes.actors.copy()
    synced: list[Sequence[int]] = []
    faulty = with_task(prompts, task, index)
    started = time.monotonic()
    groups: list[Group] = ray.get(list(echoes.generate(faulty, SAMPLING, synced.append)))
    assert time.monotonic() - started < 30
    assert sorted(group.prompt.id for group in groups) == sorted(prompt.id for prompt in faulty)
    assert "a rollout actor is back after " in capsys.readouterr().out
    assert synced == [[0]]
    assert [old == new for old, new in zip(before, echoes.actors, strict=True)] == [False, True]
    assert echoes.incidents.take()["faults/rollout_restarts"] == 1


@pytest.mark.slow
def test_after_its_restarts_a_run_stops_with_the_first_cause(echoes: RolloutPool, prompts: list[Prompt]) -> None:
    with pytest.raises(
        WorkerFailed, match=r"(?s)not restarted: 2 restarts used, faults\.max_restarts = 2\..*First cause: .*died"
    ):
        list(echoes.generate(with_task(prompts, "die always"), SAMPLING))


@pytest.mark.slow
def test_only_answers_that_break_the_grader_are_masked(
    ray_here: None, workers_config: Config, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = RewardPool(replace(workers_config.algo.reward, timeout_s=2, actors=2), incidents())
    groups = [group_of_texts(prompts[number], ["<answer>1</answer>"] * 3) for number in range(4)]
    groups[0] = group_of_texts(
        replace(prompts[0], answer="1"), ["<answer>1</answer>", "hang", "<answer>2</answer>", "die", "eat"]
    )
    for actor in pool.actors:
        ray.get(actor.__ray_call__.remote(_install_bad_reward))
    monkeypatch.setattr(pool, "_start", lambda: _with_bad_reward(RewardPool._start(pool)))
    scored = pool.score([ray.put(group) for group in groups])
    assert scored[0].valid.tolist() == [True, False, True, False, False]
    assert scored[0].parts["accuracy"].tolist() == [1, 0, 0, 0, 0]
    assert all(group.valid.all() for group in scored[1:])
    counts = pool.incidents.take()
    assert counts["faults/masked_answers"] == 3
    assert counts["faults/reward_restarts"] == 3


def group_of_texts(prompt: Prompt, texts: Sequence[str]) -> Group:
    ids = np.arange(2, dtype=np.int64)
    completions = tuple(
        Completion(token_ids=ids, sampler_logprobs=np.zeros(2, np.float32), text=text, finish="stop") for text in texts
    )
    return Group(prompt=prompt, prompt_token_ids=ids, completions=completions, version=0)


def _with_bad_reward(actor: Any) -> Any:
    actor.__ray_call__.remote(_install_bad_reward)
    return actor


def _install_bad_reward(actor: Any) -> None:
    """Make the actor's reward function hang, end its process or allocate all memory, as the answer says."""
    grade = actor.grader.accuracy

    def accuracy(text: str, answer: str) -> float:
        if text == "hang":
            time.sleep(3600)
        if text == "die":
            os._exit(1)
        if text == "eat":
            bytearray(2**33)
        verdict: float = grade(text, answer)
        return verdict

    actor.grader.accuracy = accuracy


def test_answers_that_explode_in_grading_time_out_and_count(
    ray_here: None, workers_config: Config, prompts: list[Prompt]
) -> None:
    pool = RewardPool(replace(workers_config.algo.reward, answer_cpu_s=0.5, timeout_s=60), incidents())
    texts = ["<answer>9^{9^{9^{9}}}</answer>", "<answer>99999999!</answer>", "<answer>\\sqrt[3]{8}</answer>"]
    group = group_of_texts(replace(prompts[0], answer="2"), texts)
    [scored] = pool.score([ray.put(group)])
    assert scored.valid.all()
    assert scored.parts["accuracy"].tolist() == [0, 0, 1]
    assert scored.graded == {"timeout": 2, "symbolic": 1}


def test_scores_come_back_in_the_order_of_the_prompts(workers: WorkerGroup, prompts: list[Prompt]) -> None:
    scored = workers.score(workers.generate(prompts, 0))
    assert [each.group.prompt.id for each in in_prompt_order(scored, prompts)] == [prompt.id for prompt in prompts]


class FailingEngine:
    def __init__(self) -> None:
        raise ValueError("no such model")


def test_an_engine_that_cannot_start_is_not_restarted(ray_here: None, workers_config: Config) -> None:
    watched = incidents()
    with Placement([(ProcessSpec(role="rollout", cpus=0.1, gpus=0),)], workers_config.cluster, print) as placement:
        pool = RolloutPool(FailingEngine, workers_config.rollout, placement, watched)  # type: ignore[arg-type]
        with pytest.raises(WorkerFailed, match="could not start: ValueError: no such model") as raised:
            pool.wait()
    assert not isinstance(raised.value, ProcessLost)


def test_a_run_that_does_not_fit_waits_and_logs_why_once(
    ray_here: None, workers_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It logs once a minute, after a short patience."""
    monkeypatch.setattr(placement, "_PATIENCE_S", 0.5)
    logged: list[str] = []
    large = [(ProcessSpec(role="learner", cpus=1000, gpus=0),)]
    with pytest.raises(
        ClusterError, match=r"not ready after 2 s \(cluster.wait_s\): needs 1000 CPUs \(cluster has 4, \d\S* free"
    ):
        Placement(large, replace(workers_config.cluster, wait_s=2), logged.append)
    [message] = logged
    assert message.startswith("waiting for the cluster: needs 1000 CPUs (cluster has 4, ")
