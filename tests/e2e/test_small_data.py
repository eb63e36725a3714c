"""DAPO over a few rows on real engines: prompts repeat within a step, each time as a separate sample."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from tests.driver.trace_events import spans_in
from tests.e2e.conftest import Run, StartRun

pytestmark = pytest.mark.slow

FEW = (
    *(
        "algo=dapo",
        "algo.sampling_rounds=3",
        "algo.updates_per_step=2",
        "algo.group_size=2",
    ),  # two answers are often equal
    *("data.train.size=3", "train.steps=2"),
)
EXACT = ("groups/asked", "groups/constant_frac", "reward/mean", "reward/format", "tokens/completion_mean")


@pytest.fixture(scope="module")
def few_rows(start_run: StartRun) -> Run:
    return start_run(*FEW, "train.checkpoint_every=1")


def sampled_ids(run: Run, step: int) -> list[str]:
    """Return the ids of all training prompts that the engines answered in a step (weights version = step)."""
    groups = [span.attributes for span in spans_in(run.folder / "trace.json") if span.name == "group"]
    ids = [str(group["prompt"]) for group in groups if group["version"] == step]
    return [name for name in ids if name.startswith("scenes/train/")]


def test_a_repeated_prompt_has_its_own_id(few_rows: Run) -> None:
    for step, line in enumerate(few_rows.steps):
        ids = sampled_ids(few_rows, step)
        assert len(set(ids)) == len(ids) == line["groups/asked"]
        repeats = Counter(name.partition("#")[0] for name in ids)
        assert len(repeats) == 3 and max(repeats.values()) > 1
    assert sum(line["groups/asked"] for line in few_rows.steps) > 8  # more than one round a step


def test_a_resumed_run_repeats_the_same_sampling_rounds(few_rows: Run, start_run: StartRun) -> None:
    resumed = start_run(*FEW, f"run.resume={few_rows.folder / 'checkpoints' / 'step_1'}")
    assert sorted(sampled_ids(resumed, 1)) == sorted(sampled_ids(few_rows, 1))
    [line] = resumed.steps
    assert {name: line[name] for name in EXACT} == {name: few_rows.steps[1][name] for name in EXACT}
    first, again = [
        json.loads((run.folder / "samples.jsonl").read_text().splitlines()[-1]) for run in (few_rows, resumed)
    ]
    assert first["completions"] == again["completions"] and first["prompt_id"] == again["prompt_id"]
