"""WorkerGroup's methods over recording pools, without actors."""

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
    """A learner, a push and engines in one object, which record their calls."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def sleep(self) -> None:
        pass

    def begin_update(self, packs: Any, **settings: Any) -> None:
        self.calls.append(settings)

    def begin(self) -> None:
        self.calls.append("push")

    def updated(self, begun: Any) -> list[Any]:
        return self.calls

    def generate(self, prompts: Any, sampling: Any) -> Iterator[Any]:
        self.sampling = sampling
        yield from prompts

    def prefetch(self, prompts: Any, answers: int) -> None:
        self.calls.append("prefetch")


def workers_of(recorder: Any) -> WorkerGroup:
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
def test_stale_updates_use_their_correction_and_begin_a_push(stale: bool, correction: str) -> None:
    calls: Any = workers_of(Recorder()).update([], updates=1, beta=0.1, lr=0.2, stale=stale)
    assert calls == [{"updates": 1, "beta": 0.1, "lr": 0.2, "loss": "gspo", "correction": correction}, "push"]


def test_seeds_differ_by_run_step_and_sampling_round() -> None:
    seeds = set()
    for seed, step, sampling_round in product((0, 1, 2**24, 2**64 - 1), (0, 1, 2, 24, 2**24 - 1), (0, 1, 7)):
        recorder: Any = Recorder()
        list(replace(workers_of(recorder), seed=seed).generate([], step, sampling_round))
        seeds.add(recorder.sampling.seed_of(ask("q")))
    assert len(seeds) == 4 * 5 * 3


def test_checkpoint_calls_go_to_the_learner(tmp_path: Path) -> None:
    folders: list[Path] = []
    learner: Any = SimpleNamespace(save=folders.append, saved=lambda: {"file": "digest"}, written=lambda: True)
    saving = replace(workers_of(Recorder()), learner=learner)
    saving.save(tmp_path)
    assert folders == [tmp_path]
    assert saving.saved() == {"file": "digest"}
    assert saving.written() is True


def test_eval_answers_are_greedy_or_sampled_like_the_run() -> None:
    recorder: Any = Recorder()
    rewards: Any = SimpleNamespace(score=list)
    workers = replace(workers_of(recorder), rewards=rewards, temperature=0.7, max_tokens=9, seed=3)
    prompts: Any = ["q"]
    assert workers.answer_greedily(prompts) == prompts
    assert recorder.sampling == Sampling(answers=1, max_tokens=9, temperature=0.0, seed=3)
    assert workers.answer_freely(prompts, 8) == prompts
    assert recorder.sampling == Sampling(answers=8, max_tokens=9, temperature=0.7, seed=3)


def test_prepare_goes_to_the_learner() -> None:
    learner = create_autospec(LearnerPool, instance=True)
    packs: Any = ["pack"]
    replace(workers_of(Recorder()), learner=learner).prepare(packs, updates=2, with_reference=True)
    learner.prepare.assert_called_once_with(packs, updates=2, with_reference=True)


@pytest.mark.parametrize("keep_recording", [True, False])
def test_spans_are_collected_from_each_process_by_name(keep_recording: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_group, "collect_spans", lambda actors, *, keep_recording: (actors, keep_recording))
    pools: Any = {
        "rollout": SimpleNamespace(actors=["r0", "r1"]),
        "rewards": SimpleNamespace(actors=["w0"]),
        "learner": SimpleNamespace(ranks=["l0"]),
    }
    found: Any = replace(workers_of(Recorder()), **pools).spans(keep_recording=keep_recording)
    assert found == ({"rollout 0": "r0", "rollout 1": "r1", "reward 0": "w0", "learner 0": "l0"}, keep_recording)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_upcoming_prompts_are_prefetched_once_between_groups(count: int) -> None:
    recorder: Any = Recorder()
    prompts: Any = range(count)
    for group in workers_of(recorder).generate(prompts, step=0):
        recorder.calls.append(group)
    assert [call for call in recorder.calls if call != "prefetch"] == list(range(count))
    assert recorder.calls.count("prefetch") == 1
    assert recorder.calls.index("prefetch") == (count + 1) // 2
