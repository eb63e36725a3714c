"""Bad steps are logged and dumped; too many in a row stop the run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from othink_ray.config.load import load
from othink_ray.driver.callbacks import Guards, RunawayError, StepResult
from othink_ray.types import Completion, Group, Prompt, ScoredGroup, UpdateStats
from tests.driver.fakes import NumberStream, stats_of

FAULTS = replace(load([]).faults, patience=3, kl_limit=2.0, gap_limit=0.5)


def scored(prompt: Prompt) -> ScoredGroup:
    completion = Completion(
        token_ids=np.arange(3), sampler_logprobs=np.zeros(3, np.float32), text="an answer", finish="stop"
    )
    group = Group(prompt=prompt, prompt_token_ids=np.arange(2), completions=(completion,) * 2, version=0)
    return ScoredGroup(group=group, rewards=np.ones(2), parts={}, valid=np.ones(2, dtype=bool))


def step_of(stats: UpdateStats, *, number: int = 0, sampled: bool = True) -> StepResult:
    return StepResult(
        step=number,
        data_position=0,
        schedule_state={},
        beta=0.04,
        stats=stats,
        groups=[(scored(prompt), np.zeros(2)) for prompt in NumberStream().take(3)],
        sampled=sampled,
    )


SKIPPED = replace(stats_of(), skipped=1, bad_prompts=("p1",), loss=float("nan"))


def test_good_steps_log_and_write_nothing(tmp_path: Path) -> None:
    guards = Guards(FAULTS, tmp_path, log=pytest.fail)
    for number in range(10):
        guards.check(step_of(stats_of(kl_mean=1.9, logp_gap_mean=0.4), number=number))
    guards.check(step_of(stats_of(kl_mean=float("nan"))))  # without a reference there is no KL
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("stats", "text"),
    [
        (SKIPPED, "1 update(s) skipped, because loss or gradient of p1 was not finite"),
        (stats_of(kl_mean=2.1), "KL is 2.1 nats per token, above faults.kl_limit = 2"),
        (stats_of(logp_gap_mean=0.6), "sampler and learner are 0.6 nats apart, above faults.gap_limit = 0.5"),
    ],
)
def test_bad_steps_are_logged_and_patience_stops_the_run(tmp_path: Path, stats: UpdateStats, text: str) -> None:
    logged: list[str] = []
    guards = Guards(FAULTS, tmp_path, logged.append)
    for number, stats_of_step in enumerate([stats, stats, stats_of(), stats, stats]):
        guards.check(step_of(stats_of_step, number=number))
    assert len(logged) == 4 and all(text in line for line in logged)
    with pytest.raises(RunawayError, match=r"step 6.*bad step 3 in a row.*learner\.lr"):
        guards.check(step_of(stats, number=5))


def test_the_samples_of_a_bad_step_are_written(tmp_path: Path) -> None:
    guards = Guards(FAULTS, tmp_path, log=lambda _: None)
    guards.check(step_of(SKIPPED, number=4))
    guards.check(step_of(stats_of(kl_mean=9.0), number=5))
    bad, all_groups = (json.loads((tmp_path / "faults" / f"step_{number}.json").read_text()) for number in (5, 6))
    assert [sample["prompt_id"] for sample in bad["samples"]] == ["p1"]
    assert bad["stats"]["loss"] is None
    assert [sample["prompt_id"] for sample in all_groups["samples"]] == ["p0", "p1", "p2"]
    assert all_groups["samples"][0]["completions"][0]["text"] == "an answer"


def test_the_sampler_gap_of_demonstrations_is_ignored(tmp_path: Path) -> None:
    Guards(FAULTS, tmp_path, log=pytest.fail).check(step_of(stats_of(logp_gap_mean=6.0), sampled=False))
