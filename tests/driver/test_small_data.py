"""Dynamic sampling over few rows: one question comes back within a step, and each time it is a sample of its own.

The verbs of the real team, with its seeds, over pools that answer by seed and prompt alone, as engines do.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pytest

from othink_ray.core.advantages import ADVANTAGES
from othink_ray.core.packing import LOSS_WEIGHTS, pack_step, plan
from othink_ray.data.prompt_stream import PromptStream
from othink_ray.driver.async_loop import SIDES, train_overlapped
from othink_ray.driver.loop import Recipe, Step, train
from othink_ray.engines.base import Sampling
from othink_ray.runtime.worker_group import WorkerGroup
from othink_ray.types import Audit, Completion, Group, Message, Pack, Prompt, ScoredGroup
from tests.driver.fakes import PAPER, Diary, stats_of

STEPS = 6


class Rows:
    """A source of numbered questions."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def prompt(self, index: int) -> Prompt:
        message = Message(role="user", text=f"question {index}")
        return Prompt(id=f"row{index}", messages=(message,), images=(), answer="1", task="counting")


@dataclass
class Pools:
    """Rollout, reward and learner pool and the push of one team; `teaching` is the chance that rewards differ."""

    teaching: float
    version: int = -1
    seeds: list[int] = field(default_factory=list)  # of all groups, in the order of asking
    update_weights: list[list[float]] = field(default_factory=list)  # by step, of each optimizer step

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[Group]:
        for prompt in prompts:
            self.seeds.append(sampling.seed_of(prompt))
            dice = np.random.default_rng(self.seeds[-1])
            answers = tuple(
                Completion(
                    token_ids=dice.integers(0, 10**6, length),
                    sampler_logprobs=np.zeros(length, np.float32),
                    text="",
                    finish="stop",
                )
                for length in dice.integers(1, 6, 3)
            )
            ids = np.arange(2)
            yield Group(prompt=prompt, prompt_token_ids=ids, completions=answers, version=self.version)

    def score(self, groups: Iterable[Group]) -> list[ScoredGroup]:
        scored = []
        for group in reversed(list(groups)):
            dice = np.random.default_rng(group.completions[0].token_ids)
            rewards = np.arange(3.0) * (dice.random() < self.teaching)
            scored.append(ScoredGroup(group=group, rewards=rewards, parts={}, valid=np.ones(3, dtype=np.bool_)))
        return scored

    def begin_update(self, packs: Sequence[Pack], *, updates: int, **how: Any) -> None:
        planned = plan(packs, ranks=2, updates=updates, micro_tokens=24)
        rows = [[row for rank in update for micro_batch in rank for row in micro_batch] for update in planned]
        self.update_weights.append([sum(float(packs[row].loss_weights.sum()) for row in own) for own in rows])

    def updated(self, begun: None) -> Any:
        return stats_of()

    def __call__(self, version: int) -> Audit:
        self.version = version
        return Audit(version=version, gap_mean=0.0, gap_max=0.0, tokens=1)

    def expect(self, prompts: Sequence[Prompt], answers: int) -> None: ...

    def note(self, groups: Iterable[Group]) -> None: ...

    def sleep(self) -> None: ...

    def begin(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A configuration drawn at random: often more is requested in a step than there are rows."""

    rows: int
    prompts: int
    updates: int
    rounds: int
    teaching: float
    shared_prefix: bool
    overlap: bool
    read_ahead: bool

    @classmethod
    def drawn(cls, seed: int) -> Setting:
        dice = np.random.default_rng(seed)
        prompts = int(dice.integers(1, 9))
        return cls(
            rows=int(dice.integers(1, 12)),
            prompts=prompts,
            updates=int(dice.integers(1, prompts + 1)),
            rounds=int(dice.integers(1, 8)),
            teaching=float(dice.choice([0.0, 0.15, 0.5, 0.9])),
            shared_prefix=bool(dice.random() < 0.7),
            overlap=bool(dice.random() < 0.5),
            read_ahead=bool(dice.random() < 0.5),
        )


def live(own: Setting, steps: range, position: int = 0) -> tuple[list[Step], Pools]:
    """Some steps of a run with this setting, from a position in its data."""
    pools: Any = Pools(own.teaching)
    stream = PromptStream(
        Rows(own.rows),
        seed=3,
        on_bad_row="stop",
        position=position,
        read_ahead=own.prompts if own.read_ahead else 0,
    )
    team = WorkerGroup(
        rollout=pools,
        rewards=pools,
        incidents=pools,
        learner=pools,
        pusher=pools,
        max_tokens=8,
        temperature=1.0,
        seed=5,
        answers=3,
        loss="grpo",
        correction="none",
        stale_correction="none",
        upcoming=stream.upcoming,
    )
    recipe = Recipe(
        prompts_per_step=own.prompts,
        updates_per_step=own.updates,
        sampling_rounds=own.rounds,
        advantages=ADVANTAGES["group_std"],
        pack=partial(
            pack_step,
            updates=own.updates,
            loss_weights=LOSS_WEIGHTS["token_mean"],
            max_tokens=8,
            shared_prefix=own.shared_prefix,
        ),
    )
    diary = Diary()
    how: dict[str, Any] = {
        "steps": steps,
        "recipe": recipe,
        "schedule": PAPER,
        "schedule_state": {},
        "lr": lambda step: 1.0,
        "journal": diary,
    }
    try:
        if own.overlap:
            with ThreadPoolExecutor(max_workers=SIDES) as sides:
                train_overlapped(sides, team, stream, prepare_ahead=False, **how)
        else:
            train(team, stream, **how)
    finally:
        stream.close()
    return diary.steps, pools


def answers(groups: Sequence[ScoredGroup]) -> list[list[list[int]]]:
    return [[answer.token_ids.tolist() for answer in one.group.completions] for one in groups]


@pytest.mark.parametrize("seed", range(60))
def test_every_group_of_a_step_is_a_sample_of_its_own(seed: int) -> None:
    own = Setting.drawn(seed)
    steps, pools = live(own, range(STEPS))
    assert len(steps) == STEPS
    seeds = iter(pools.seeds)
    for seen in steps:
        requested, trained = [[one.group.prompt.id for one in groups] for groups in (seen.requested, seen.scored)]
        assert len(set(requested)) == len(requested)
        assert len(trained) == own.prompts and len(set(trained)) == own.prompts
        assert len({next(seeds) for _ in requested}) == len(requested)
        assert len({str(own) for own in answers(seen.requested)}) == len(requested)
    assert len(pools.update_weights) == STEPS
    assert np.array(pools.update_weights) == pytest.approx(np.ones((STEPS, own.updates)))


def test_the_settings_drawn_ask_questions_again_within_a_step() -> None:
    def repeats(seen: Step) -> int:
        questions = [one.group.prompt.messages[0].text for one in seen.requested]
        return len(questions) - len(set(questions))

    for overlap in (False, True):
        chosen = [seed for seed in range(60) if Setting.drawn(seed).overlap == overlap]
        assert sum(repeats(seen) for seed in chosen for seen in live(Setting.drawn(seed), range(STEPS))[0]) > 500


@pytest.mark.parametrize("seed", range(60, 80))
def test_a_resumed_run_repeats_all_rounds_token_by_token(seed: int) -> None:
    own = Setting.drawn(seed)
    whole, _ = live(own, range(STEPS))
    for after in (1, 4):
        rest, _ = live(own, range(after, STEPS), whole[after - 1].data_position)
        for one, other in zip(rest, whole[after:], strict=True):
            assert answers(one.requested) == answers(other.requested)
            assert answers(one.scored) == answers(other.scored)
            assert [own.group.prompt for own in one.requested] == [own.group.prompt for own in other.requested]
            assert one.data_position == other.data_position
