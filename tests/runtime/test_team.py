"""The verbs of a team that need no actors to be told apart."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import create_autospec

import pytest

from othink_ray.engines.base import Sampling
from othink_ray.runtime import worker_group
from othink_ray.runtime.learner_pool import LearnerPool
from othink_ray.runtime.worker_group import WorkerGroup
from tests.engines.samples import ask


class Recorder:
    """A learner and a push that only remember how they were asked, and engines that stay awake."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def sleep(self) -> None:
        pass

    def begin_update(self, packs: Any, **how: Any) -> None:
        self.asked.append(how)

    def begin(self) -> None:
        self.asked.append("push")

    def updated(self, begun: Any) -> list[Any]:
        return self.asked

    def generate(self, prompts: Any, sampling: Any) -> Iterator[Any]:
        self.sampling = sampling
        yield from prompts

    def prefetch(self, coming: Any, answers: int) -> None:
        self.asked.append("expect")


def team_of(recorder: Any) -> WorkerGroup:
    unused: Any = None
    return WorkerGroup(
        rollout=recorder,
        rewards=unused,
        incidents=unused,
        learner=recorder,
        pusher=recorder,
        max_tokens=1,
        temperature=1.0,
        seed=0,
        answers=2,
        loss="gspo",
        correction="icepop",
        stale_correction="sequence",
        upcoming=tuple,
    )


@pytest.mark.parametrize(("stale", "correction"), [(False, "icepop"), (True, "sequence")])
def test_answers_of_older_weights_have_a_correction_of_their_own_and_a_push_begins_behind_each_update(
    stale: bool, correction: str
) -> None:
    asked: Any = team_of(Recorder()).update([], updates=1, beta=0.1, lr=0.2, stale=stale)
    assert asked == [{"updates": 1, "beta": 0.1, "lr": 0.2, "loss": "gspo", "correction": correction}, "push"]


def test_seeds_differ_by_run_step_and_sampling_round() -> None:
    seeds = set()
    for seed, step, sampling_round in product((0, 1, 2**24, 2**64 - 1), (0, 1, 2, 24, 2**24 - 1), (0, 1, 7)):
        recorder: Any = Recorder()
        list(replace(team_of(recorder), seed=seed).generate([], step, sampling_round))
        seeds.add(recorder.sampling.seed_of(ask("q")))
    assert len(seeds) == 4 * 5 * 3


def test_a_checkpoint_is_the_learners(tmp_path: Path) -> None:
    folders: list[Path] = []
    learner: Any = SimpleNamespace(save=folders.append, saved=lambda: {"file": "digest"}, written=lambda: True)
    saving = replace(team_of(Recorder()), learner=learner)
    saving.save(tmp_path)
    assert folders == [tmp_path]
    assert saving.saved() == {"file": "digest"}
    assert saving.written() is True


def test_examinations_are_greedy_or_as_a_run_samples() -> None:
    recorder: Any = Recorder()
    rewards: Any = SimpleNamespace(score=list)
    examiners = replace(team_of(recorder), rewards=rewards, temperature=0.7, max_tokens=9, seed=3)
    questions: Any = ["q"]
    assert examiners.answer_greedily(questions) == questions
    assert recorder.sampling == Sampling(answers=1, max_tokens=9, temperature=0.0, seed=3)
    assert examiners.answer_freely(questions, 8) == questions
    assert recorder.sampling == Sampling(answers=8, max_tokens=9, temperature=0.7, seed=3)


def test_what_can_be_prepared_is_the_learners_to_prepare() -> None:
    learner = create_autospec(LearnerPool, instance=True)
    packs: Any = ["pack"]
    replace(team_of(Recorder()), learner=learner).prepare(packs, updates=2, with_reference=True)
    learner.prepare.assert_called_once_with(packs, updates=2, with_reference=True)


@pytest.mark.parametrize("go_on", [True, False])
def test_each_process_is_asked_for_its_spans_by_name(go_on: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_group, "spans_of", lambda actors, *, go_on: (actors, go_on))
    pools: Any = {
        "rollout": SimpleNamespace(actors=["r0", "r1"]),
        "rewards": SimpleNamespace(actors=["w0"]),
        "learner": SimpleNamespace(ranks=["l0"]),
    }
    found: Any = replace(team_of(Recorder()), **pools).spans(go_on=go_on)
    assert found == ({"rollout 0": "r0", "rollout 1": "r1", "reward 0": "w0", "learner 0": "l0"}, go_on)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_engines_hear_of_the_next_questions_once_and_between_the_groups(count: int) -> None:
    recorder: Any = Recorder()
    questions: Any = range(count)
    for group in team_of(recorder).generate(questions, step=0):
        recorder.asked.append(group)
    assert [one for one in recorder.asked if one != "expect"] == list(range(count))
    assert recorder.asked.count("expect") == 1
    assert recorder.asked.index("expect") == (count + 1) // 2
