"""What the pools promise: order, masks and named failures."""

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
from othink_ray.driver.loop import in_order
from othink_ray.engines.base import Sampling
from othink_ray.runtime import placement
from othink_ray.runtime.cluster import ClusterError
from othink_ray.runtime.futures import ProcessLost, WorkerFailed
from othink_ray.runtime.placement import Placement, ProcessSpec
from othink_ray.runtime.reward_pool import RewardPool
from othink_ray.runtime.rollout_pool import RolloutPool
from othink_ray.runtime.worker_group import WorkerGroup
from othink_ray.types import Completion, Group, Prompt
from tests.runtime.conftest import incidents

SAMPLING = Sampling(answers=2, max_tokens=4, temperature=1.0, seed=0)


class Echo:
    """A rollout engine that answers with the prompt's own id, or does what the task says: the first time only."""

    version = 0

    def __init__(self, scars: Path) -> None:
        self.scars = scars

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[Group]:
        for prompt in prompts:
            scar = self.scars / prompt.id
            if prompt.task == "fail":
                raise ValueError("no answer to this one")
            if prompt.task in ("die", "hang", "die always") and not scar.exists():
                if prompt.task != "die always":
                    scar.touch()
                if prompt.task == "hang":
                    time.sleep(3600)
                os._exit(1)
            ids = np.arange(2, dtype=np.int64)
            completion = Completion(token_ids=ids, sampler_logprobs=np.zeros(2, np.float32), text="", finish="stop")
            yield Group(
                prompt=prompt, prompt_token_ids=ids, completions=(completion,) * sampling.answers, version=self.version
            )


@pytest.fixture
def echoes(ray_here: None, team_config: Config, tmp_path: Path) -> Iterator[RolloutPool]:
    seats = [(ProcessSpec(role="rollout", cpus=0.1, gpus=0),)] * 2
    rollout = replace(team_config.rollout, num_actors=2, step_timeout_s=3)
    with Placement(seats, team_config.cluster, print) as placement:
        pool = RolloutPool(partial(Echo, tmp_path), rollout, placement, incidents(max_restarts=2))  # type: ignore[arg-type]
        pool.wait()
        yield pool


def asked_for(prompts: Sequence[Prompt], task: str, place: int = 0) -> list[Prompt]:
    """The prompts, of which one has that task."""
    return [replace(one, id=f"{task}-0", task=task) if at == place else one for at, one in enumerate(prompts)]


def test_every_prompt_is_answered_once_whichever_actor_answers(echoes: RolloutPool, asked: list[Prompt]) -> None:
    groups: list[Group] = ray.get(list(echoes.generate(asked, SAMPLING)))
    assert sorted(group.prompt.id for group in groups) == sorted(prompt.id for prompt in asked)


def test_an_engine_that_fails_is_named_with_its_cause_and_not_asked_again(
    echoes: RolloutPool, asked: list[Prompt]
) -> None:
    with pytest.raises(WorkerFailed, match="no answer to this one"):
        list(echoes.generate(asked_for(asked, "fail"), SAMPLING))
    assert echoes.incidents.restarts == 0


@pytest.mark.parametrize(("task", "place"), [("die", 2), ("hang", 0)])
def test_an_engine_that_is_lost_is_replaced_and_its_prompts_asked_again(
    echoes: RolloutPool, asked: list[Prompt], task: str, place: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the place 2 it is lost after its first group, which is not asked for again."""
    before = echoes.actors.copy()
    equipped: list[Sequence[int]] = []
    echoes.sync_new_engines = equipped.append
    prompts = asked_for(asked, task, place)
    started = time.monotonic()
    groups: list[Group] = ray.get(list(echoes.generate(prompts, SAMPLING)))
    assert time.monotonic() - started < 30
    assert sorted(group.prompt.id for group in groups) == sorted(prompt.id for prompt in prompts)
    assert "a rollout actor is back after " in capsys.readouterr().out
    assert equipped == [[0]]
    assert [old == new for old, new in zip(before, echoes.actors, strict=True)] == [False, True]
    assert echoes.incidents.take()["faults/rollout_restarts"] == 1


def test_after_its_restarts_a_run_stops_with_the_first_cause(echoes: RolloutPool, asked: list[Prompt]) -> None:
    with pytest.raises(
        WorkerFailed, match=r"(?s)2 restarts before, and faults\.max_restarts = 2\..*first cause was.*died"
    ):
        list(echoes.generate(asked_for(asked, "die always"), SAMPLING))


def test_of_a_group_only_the_answer_that_hangs_or_kills_its_grader_is_masked(
    ray_here: None, team_config: Config, asked: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = RewardPool(replace(team_config.algo.reward, timeout_s=2, actors=2), incidents())
    groups = [group_of_texts(asked[number], ["<answer>1</answer>"] * 3) for number in range(4)]
    groups[0] = group_of_texts(
        replace(asked[0], answer="1"), ["<answer>1</answer>", "hang", "<answer>2</answer>", "die", "eat"]
    )
    for actor in pool.actors:
        ray.get(actor.__ray_call__.remote(_grade_badly))
    monkeypatch.setattr(pool, "_start", lambda: _badly_graded(RewardPool._start(pool)))
    scored = pool.score([ray.put(group) for group in groups])
    assert scored[0].valid.tolist() == [True, False, True, False, False]
    assert scored[0].parts["accuracy"].tolist() == [1, 0, 0, 0, 0]
    assert all(one.valid.all() for one in scored[1:])
    counts = pool.incidents.take()
    assert counts["faults/masked_answers"] == 3
    assert counts["faults/reward_restarts"] == 3


def group_of_texts(prompt: Prompt, texts: Sequence[str]) -> Group:
    ids = np.arange(2, dtype=np.int64)
    completions = tuple(
        Completion(token_ids=ids, sampler_logprobs=np.zeros(2, np.float32), text=text, finish="stop") for text in texts
    )
    return Group(prompt=prompt, prompt_token_ids=ids, completions=completions, version=0)


def _badly_graded(actor: Any) -> Any:
    actor.__ray_call__.remote(_grade_badly)
    return actor


def _grade_badly(actor: Any) -> None:
    """A user's reward function that hangs, takes its process with it, or eats all memory."""
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


def test_a_group_of_bombs_is_over_in_its_time_and_counted(
    ray_here: None, team_config: Config, asked: list[Prompt]
) -> None:
    pool = RewardPool(replace(team_config.algo.reward, answer_cpu_s=0.5, timeout_s=60), incidents())
    texts = ["<answer>9^{9^{9^{9}}}</answer>", "<answer>99999999!</answer>", "<answer>\\sqrt[3]{8}</answer>"]
    group = group_of_texts(replace(asked[0], answer="2"), texts)
    [scored] = pool.score([ray.put(group)])
    assert scored.valid.all()
    assert scored.parts["accuracy"].tolist() == [0, 0, 1]
    assert scored.graded == {"timeout": 2, "symbolic": 1}


def test_scores_come_back_in_the_order_of_the_prompts(team: WorkerGroup, asked: list[Prompt]) -> None:
    scored = team.score(team.generate(asked, 0))
    assert [one.group.prompt.id for one in in_order(scored, asked)] == [prompt.id for prompt in asked]


class Unfit:
    def __init__(self) -> None:
        raise ValueError("no such model")


def test_an_engine_that_cannot_start_is_named_with_its_cause_and_not_started_again(
    ray_here: None, team_config: Config
) -> None:
    watched = incidents()
    with Placement([(ProcessSpec(role="rollout", cpus=0.1, gpus=0),)], team_config.cluster, print) as placement:
        pool = RolloutPool(Unfit, team_config.rollout, placement, watched)  # type: ignore[arg-type]
        with pytest.raises(WorkerFailed, match="could not start: ValueError: no such model") as raised:
            pool.wait()
    assert not isinstance(raised.value, ProcessLost)


def test_a_run_that_does_not_fit_waits_and_says_once_for_what(
    ray_here: None, team_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once in a minute, after its first moments."""
    monkeypatch.setattr(placement, "_PATIENCE_S", 0.5)
    said: list[str] = []
    large = [(ProcessSpec(role="learner", cpus=1000, gpus=0),)]
    with pytest.raises(ClusterError, match=r"within 2 s \(cluster.wait_s\): it needs 1000 CPUs \(has 4, free \d"):
        Placement(large, replace(team_config.cluster, wait_s=2), said.append)
    [told] = said
    assert told.startswith("waiting for the cluster: it needs 1000 CPUs (has 4, free ")
