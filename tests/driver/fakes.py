"""Fakes for the loop: scripted workers, an endless stream of numbered prompts, and callbacks that record."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import MISSING, dataclass, field, fields
from functools import partial
from typing import Any

import numpy as np

from othink_ray.core.advantages import ADVANTAGES
from othink_ray.core.kl import BetaSchedule
from othink_ray.core.packing import LOSS_WEIGHTS, pack_step
from othink_ray.driver.loop import Recipe, StepRecord
from othink_ray.types import Audit, Completion, Group, Message, Prompt, ScoredGroup, UpdateRequest, UpdateStats

ANSWERS = 3
STALE_TIS = "token"


class NumberStream:
    """An endless stream of prompts p0, p1, ..."""

    def __init__(self) -> None:
        self.position = 0

    def take(self, count: int, beside: Sequence[Prompt] = ()) -> list[Prompt]:
        first, self.position = self.position, self.position + count
        return [self._prompt(number) for number in range(first, self.position)]

    def upcoming(self) -> list[Prompt]:
        return [self._prompt(number) for number in range(self.position, self.position + 2)]

    @staticmethod
    def _prompt(number: int) -> Prompt:
        message = Message(role="user", text="?")
        return Prompt(id=f"p{number}", messages=(message,), images=(), answer="1", task="counting")


def stats_of(**known: float) -> UpdateStats:
    """Return statistics of one token; fields that are not given are 0."""
    zeros: dict[str, Any] = dict.fromkeys((item.name for item in fields(UpdateStats) if item.default is MISSING), 0)
    return UpdateStats(**zeros | {"tokens": 1} | known)


@dataclass
class ScriptedWorkers:
    """Records the calls; answers with `version`, the last pushed weights, and finishes groups in reverse order."""

    calls: list[tuple[Any, ...]] = field(default_factory=list)
    version: int = -1
    lag: int = 0
    masked: bool = False
    constant: frozenset[int] = frozenset()  # numbers of prompts whose answers all get the same reward
    kl: float = 0.0
    rates: list[float] = field(default_factory=list)
    stale: list[bool] = field(default_factory=list)
    prepared: list[tuple[list[str], int, bool]] = field(default_factory=list)
    rounds: list[int] = field(default_factory=list)  # the sampling round of each call of `generate`
    prefetched: list[list[str]] = field(default_factory=list)  # prompt ids of each call of `prefetch`
    beside: list[str] = field(default_factory=list)  # the verbs between scoring and pushing, in order

    def generate(self, prompts: Sequence[Prompt], step: int, sampling_round: int) -> Iterator[Group]:
        self.calls.append(("generate", step))
        self.rounds.append(sampling_round)
        for prompt in reversed(prompts):
            answers = tuple(
                Completion(
                    token_ids=np.arange(1, length + 2),
                    sampler_logprobs=np.zeros(length + 1, np.float32),
                    text="",
                    finish="stop",
                )
                for length in range(ANSWERS)
            )
            ids = np.arange(2)
            yield Group(
                prompt=prompt,
                prompt_token_ids=ids,
                completions=answers,
                version=self.version - self.lag,
                image_encodes=2,
            )

    def score(self, groups: Iterable[Group]) -> list[ScoredGroup]:
        scored = []
        for group in groups:
            rewards = np.arange(ANSWERS, dtype=float) * (int(group.prompt.id[1:]) not in self.constant)
            valid = np.array([not self.masked] * ANSWERS)
            scored.append(
                ScoredGroup(
                    group=group,
                    rewards=rewards,
                    parts={"accuracy": rewards},
                    valid=valid,
                    graded={"rules": 2, "timeout": 1},
                )
            )
        self.calls.append(("score", len(scored)))
        return scored

    def record_lengths(self, scored_groups: Sequence[ScoredGroup]) -> None:
        self.beside.append("record_lengths")

    def sleep(self) -> None:
        self.beside.append("sleep")

    def begin_update(self, request: UpdateRequest) -> UpdateStats:
        settings = request.settings
        self.calls.append(("update", [pack.prompt_id for pack in request.packs], request.updates, settings.beta))
        self.beside.append("begin_update")
        self.rates.append(settings.lr)
        self.stale.append(settings.tis == STALE_TIS)
        self.weight = sum(pack.loss_weights.sum() for pack in request.packs)
        return stats_of(kl_mean=self.kl)

    def begin_push(self) -> None:
        self.beside.append("begin_push")

    def prefetch(self, prompts: Sequence[Prompt]) -> None:
        self.beside.append("prefetch")
        self.prefetched.append([prompt.id for prompt in prompts])

    def finish_update(self, update: UpdateStats) -> UpdateStats:
        self.beside.append("finish_update")
        return update

    def prefetch_update(self, request: UpdateRequest) -> None:
        self.prepared.append(([pack.prompt_id for pack in request.packs], request.updates, request.settings.beta > 0))

    def push(self, version: int) -> Audit:
        self.calls.append(("push", version))
        self.version = version
        return Audit(version=version, gap_mean=0.0, gap_max=0.0, tokens=1)


class RecordingCallbacks:
    """Callbacks that keep every record."""

    def __init__(self) -> None:
        self.started: list[int] = []
        self.steps: list[StepRecord] = []

    def on_start(self, step: int) -> None:
        self.started.append(step)

    def on_step(self, record: StepRecord) -> None:
        self.steps.append(record)


PAPER = BetaSchedule(name="paper", total=10, beta_min=0.04, beta_max=0.1, explore_frac=0.3, target=0.01, adapt_rate=0.1)


def recipe_of(*, updates: int = 1, rounds: int = 1) -> Recipe:
    """Return a recipe of four prompts per step."""
    return Recipe(
        prompts_per_step=4,
        updates_per_step=updates,
        sampling_rounds=rounds,
        advantages=ADVANTAGES["group_std"],
        pack=partial(
            pack_step, updates=updates, loss_weights=LOSS_WEIGHTS["answer_mean"], max_tokens=8, shared_prefix=True
        ),
        loss="grpo",
        tis="none",
        stale_tis=STALE_TIS,
    )
