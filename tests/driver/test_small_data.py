"""Dynamic sampling over few rows: a prompt is requested again within a step, each time with another seed.

Uses the real WorkerGroup with its seeds, over fake pools whose answers depend only on seed and prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest

from othink_ray.core.advantages import ADVANTAGES
from othink_ray.core.packing import LOSS_WEIGHTS, pack_step
from othink_ray.data.prompt_stream import PromptStream
from othink_ray.driver.async_loop import OVERLAP_THREADS, train_overlapped
from othink_ray.driver.loop import Recipe, StepRecord, train
from othink_ray.types import Message, Prompt, ScoredGroup
from tests.driver.fakes import PAPER, RecordingCallbacks
from tests.driver.scripted_pools import ScriptedPools, worker_group

STEPS = 6


class Rows:
    """A source of numbered prompts."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def prompt(self, index: int) -> Prompt:
        message = Message(role="user", text=f"question {index}")
        return Prompt(id=f"row{index}", messages=(message,), images=(), answer="1", task="counting")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A random configuration; a step often requests more prompts than there are rows."""

    rows: int
    prompts: int
    updates: int
    rounds: int
    signal: float
    shared_prefix: bool
    overlap: bool
    prefetch: bool

    @classmethod
    def drawn(cls, seed: int) -> Setting:
        rng = np.random.default_rng(seed)
        prompts = int(rng.integers(1, 9))
        return cls(
            rows=int(rng.integers(1, 12)),
            prompts=prompts,
            updates=int(rng.integers(1, prompts + 1)),
            rounds=int(rng.integers(1, 8)),
            signal=float(rng.choice([0.0, 0.15, 0.5, 0.9])),
            shared_prefix=bool(rng.random() < 0.7),
            overlap=bool(rng.random() < 0.5),
            prefetch=bool(rng.random() < 0.5),
        )


def run(setting: Setting, steps: range, position: int = 0) -> tuple[list[StepRecord], ScriptedPools]:
    """Run some steps with this setting from a position in the data."""
    pools = ScriptedPools(setting.signal)
    stream = PromptStream(
        Rows(setting.rows),
        seed=3,
        on_bad_row="stop",
        position=position,
        prefetch=setting.prompts if setting.prefetch else 0,
    )
    workers = worker_group(pools)
    recipe = Recipe(
        prompts_per_step=setting.prompts,
        updates_per_step=setting.updates,
        sampling_rounds=setting.rounds,
        advantages=ADVANTAGES["group_std"],
        pack=partial(
            pack_step,
            updates=setting.updates,
            loss_weights=LOSS_WEIGHTS["token_mean"],
            max_tokens=8,
            shared_prefix=setting.shared_prefix,
        ),
        loss="grpo",
        tis="none",
        stale_tis="none",
    )
    callbacks = RecordingCallbacks()
    how: dict[str, Any] = {
        "steps": steps,
        "recipe": recipe,
        "schedule": PAPER,
        "schedule_state": {},
        "lr": lambda step: 1.0,
        "callbacks": callbacks,
    }
    try:
        if setting.overlap:
            with ThreadPoolExecutor(max_workers=OVERLAP_THREADS) as executor:
                train_overlapped(executor, workers, stream, prefetch_update=False, **how)
        else:
            train(workers, stream, **how)
    finally:
        stream.close()
    return callbacks.steps, pools


def ids_of(groups: Sequence[ScoredGroup]) -> list[str]:
    return [scored.group.prompt.id for scored in groups]


def answers(groups: Sequence[ScoredGroup]) -> list[list[list[int]]]:
    return [[answer.token_ids.tolist() for answer in scored.group.completions] for scored in groups]


@pytest.mark.parametrize("seed", range(60))
def test_every_group_of_a_step_is_sampled_with_its_own_seed(seed: int) -> None:
    setting = Setting.drawn(seed)
    steps, pools = run(setting, range(STEPS))
    assert len(steps) == STEPS
    seeds = iter(pools.seeds)
    for record in steps:
        requested, trained = ids_of(record.requested), ids_of(record.scored)
        assert len(set(requested)) == len(requested)
        assert len(trained) == setting.prompts and len(set(trained)) == setting.prompts
        assert len({next(seeds) for _ in requested}) == len(requested)
        assert len({str(ids) for ids in answers(record.requested)}) == len(requested)
    assert len(pools.update_weights) == STEPS
    assert np.array(pools.update_weights) == pytest.approx(np.ones((STEPS, setting.updates)))


def test_the_drawn_settings_repeat_prompts_within_a_step() -> None:
    def repeats(record: StepRecord) -> int:
        questions = [scored.group.prompt.messages[0].text for scored in record.requested]
        return len(questions) - len(set(questions))

    for overlap in (False, True):
        chosen = [seed for seed in range(60) if Setting.drawn(seed).overlap == overlap]
        assert sum(repeats(record) for seed in chosen for record in run(Setting.drawn(seed), range(STEPS))[0]) > 500


@pytest.mark.parametrize("seed", range(60, 80))
def test_a_resumed_run_repeats_all_rounds_token_by_token(seed: int) -> None:
    setting = Setting.drawn(seed)
    whole, _ = run(setting, range(STEPS))
    for after in (1, 4):
        rest, _ = run(setting, range(after, STEPS), whole[after - 1].data_position)
        for resumed, expected in zip(rest, whole[after:], strict=True):
            assert answers(resumed.requested) == answers(expected.requested)
            assert answers(resumed.scored) == answers(expected.scored)
            assert [scored.group.prompt for scored in resumed.requested] == [
                scored.group.prompt for scored in expected.requested
            ]
            assert resumed.data_position == expected.data_position
