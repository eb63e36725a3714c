"""Supervised fine-tuning: the loop, its packed samples, and the engines that evaluate it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from othink_ray.core.packing import pack_demonstrations
from othink_ray.driver.callbacks import RunCallbacks, SFTCallbacks
from othink_ray.driver.sft import SFTStepRecord, fine_tune
from othink_ray.types import Completion, Group, Prompt, UpdateRequest, UpdateStats
from tests.driver.fakes import NumberStream, stats_of


def demonstration(prompt: Prompt, length: int) -> Group:
    completion = Completion(
        token_ids=np.arange(length), sampler_logprobs=np.zeros(length, np.float32), text="", finish="stop"
    )
    return Group(prompt=prompt, prompt_token_ids=np.arange(2), completions=(completion,), version=0)


class Recorded:
    """Demonstrations, learner and callbacks in one; records the calls."""

    def __init__(self) -> None:
        self.requests: list[UpdateRequest] = []
        self.started: list[int] = []
        self.steps: list[SFTStepRecord] = []

    def answer(self, prompts: Sequence[Prompt]) -> list[Group]:
        return [demonstration(prompt, length) for length, prompt in enumerate(prompts, start=1)]

    def update(self, request: UpdateRequest) -> UpdateStats:
        self.requests.append(request)
        return stats_of()

    def on_start(self, step: int) -> None:
        self.started.append(step)

    def on_step(self, record: SFTStepRecord) -> None:
        self.steps.append(record)


def test_each_step_trains_on_the_next_demonstrations() -> None:
    fake = Recorded()
    fine_tune(fake, fake, NumberStream(), steps=range(2, 4), batch_size=3, lr=lambda step: float(step), callbacks=fake)
    assert fake.started == [2]
    assert [(record.step, record.data_position) for record in fake.steps] == [(2, 3), (3, 6)]
    trained = [[sample.prompt_id for sample in request.packs] for request in fake.requests]
    assert trained == [["p0", "p1", "p2"], ["p3", "p4", "p5"]]
    assert [request.settings.lr for request in fake.requests] == [2.0, 3.0]
    assert {(request.updates, request.settings.loss, request.settings.beta) for request in fake.requests} == {
        (1, "sft", 0.0)
    }


def test_answers_weigh_the_same_and_so_do_their_tokens() -> None:
    prompts = NumberStream().take(3)
    lengths = (1, 4, 7)
    packs = pack_demonstrations([demonstration(*pair) for pair in zip(prompts, lengths, strict=True)])
    assert [sample.loss_weights.sum() for sample in packs] == pytest.approx([1 / 3] * 3)
    for sample, length in zip(packs, lengths, strict=True):
        assert sample.loss_weights.tolist() == [0.0, 0.0, *[1 / (3 * length)] * length]


def test_engines_get_the_weights_for_evaluation_then_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    class Engines:
        def push(self, version: int) -> None:
            calls.append(f"push {version}")

        def sleep(self) -> None:
            calls.append("sleep")

    def evaluate(self: Any, step: int) -> dict[str, Any]:
        calls.append("evaluate")
        return {}

    monkeypatch.setattr(RunCallbacks, "_evaluate", evaluate)
    callbacks = SFTCallbacks.__new__(SFTCallbacks)
    callbacks.workers = Engines()  # type: ignore[assignment]
    callbacks._evaluate(3)
    assert calls == ["push 3", "evaluate", "sleep"]
