"""WorkerGroup's methods over recording pools, without actors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from othink_ray.engines.base import Sampling
from othink_ray.runtime import worker_group
from othink_ray.runtime.worker_group import WorkerGroup
from othink_ray.types import UpdateRequest
from tests.engines.samples import ask


class Recorder:
    """A learner, a push and engines in one object, which record their calls."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def sleep(self) -> None:
        self.calls.append("sleep")

    def begin_update(self, request: Any) -> None:
        self.calls.append(("begin_update", request))

    def begin(self) -> None:
        self.calls.append("begin push")

    def finish_update(self, begun: Any) -> None:
        self.calls.append("finish_update")

    def generate(self, prompts: Any, sampling: Any, sync: Any) -> Iterator[Any]:
        self.sampling, self.sync = sampling, sync
        yield from prompts

    def prefetch(self, *arguments: Any) -> None:
        self.calls.append(("prefetch", *arguments))


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
    )


def test_each_verb_does_only_what_its_name_says() -> None:
    recorder, request = Recorder(), cast(UpdateRequest, "request")
    workers = workers_of(recorder)
    list(workers.generate([], 0))
    assert recorder.calls == []
    workers.sleep()
    workers.begin_update(request)
    workers.begin_push()
    workers.prefetch([])
    workers.finish_update([])
    workers.prefetch_update(request)
    assert recorder.calls == [
        "sleep",
        ("begin_update", request),
        "begin push",
        ("prefetch", [], 2),
        "finish_update",
        ("prefetch", request),
    ]


def test_replaced_engines_are_synced_in_training_and_evaluation() -> None:
    recorder: Any = Recorder()
    rewards: Any = SimpleNamespace(score=list)

    def sync(engines: Sequence[int]) -> None: ...

    workers = replace(workers_of(recorder), rewards=rewards, sync_new_engines=sync)
    list(workers.generate([], 0))
    assert recorder.sync is sync
    recorder.sync = None
    workers.answer_greedily([])
    assert recorder.sync is sync


def test_seeds_differ_by_run_step_and_sampling_round() -> None:
    seeds = set()
    for seed, step, sampling_round in product((0, 1, 2**24, 2**64 - 1), (0, 1, 2, 24, 2**24 - 1), (0, 1, 7)):
        recorder: Any = Recorder()
        list(replace(workers_of(recorder), seed=seed).generate([], step, sampling_round))
        seeds.add(recorder.sampling.seed_of(ask("q")))
    assert len(seeds) == 4 * 5 * 3


def test_checkpoint_calls_go_to_the_learner(tmp_path: Path) -> None:
    folders: list[Path] = []
    learner: Any = SimpleNamespace(
        save=folders.append, finish_save=lambda: {"file": "digest"}, save_is_written=lambda: True
    )
    saving = replace(workers_of(Recorder()), learner=learner)
    saving.save(tmp_path)
    assert folders == [tmp_path]
    assert saving.finish_save() == {"file": "digest"}
    assert saving.save_is_written() is True


def test_eval_answers_are_greedy_or_sampled_like_the_run() -> None:
    recorder: Any = Recorder()
    rewards: Any = SimpleNamespace(score=list)
    workers = replace(workers_of(recorder), rewards=rewards, temperature=0.7, max_tokens=9, seed=3)
    prompts: Any = ["q"]
    assert workers.answer_greedily(prompts) == prompts
    assert recorder.sampling == Sampling(answers=1, max_tokens=9, temperature=0.0, seed=3)
    assert workers.answer_freely(prompts, 8) == prompts
    assert recorder.sampling == Sampling(answers=8, max_tokens=9, temperature=0.7, seed=3)


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
