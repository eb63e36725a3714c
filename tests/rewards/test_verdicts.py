"""Every case of verdicts.tsv, which was written before the code: its verdict and the layer that decides it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from othink_ray.config.bounds import WITHOUT_TAG as NAMES
from othink_ray.rewards import Grader, accuracy
from othink_ray.rewards.parse import WITHOUT_TAG, stated_text
from tests.rewards.conftest import REWARD

LINES = Path(__file__).with_name("verdicts.tsv").read_text(encoding="utf-8").splitlines()
TABLE = (Path(__file__).parents[2] / "docs" / "custom_reward.md").read_text(encoding="utf-8").splitlines()
CASES = [tuple(line.split("\t")) for line in LINES if not line.startswith("#")]


def test_the_table_covers_both_verdicts_of_both_layers() -> None:
    assert len(CASES) >= 880
    assert len(set(CASES)) == len(CASES)
    assert {case[2:] for case in CASES} == {(verdict, layer) for verdict in "01" for layer in ("rules", "symbolic")}


@pytest.mark.parametrize(("stated", "truth", "verdict", "layer"), CASES)
def test_each_case_has_its_verdict_and_deciding_layer(
    stated: str, truth: str, verdict: str, layer: str, grader: Grader
) -> None:
    text = f"<think> 99 </think><answer>{stated}</answer>"
    before = grader.counts.copy()
    assert grader.accuracy(text, truth) == float(verdict)
    assert grader.counts - before == {layer: 1}
    assert accuracy(text, truth) == (float(verdict) if layer == "rules" else 0.0)


def test_the_documented_verdicts_hold() -> None:
    rows = [line.strip("| ").split(" | ") for line in TABLE if line.startswith("| ")][1:]
    assert len(rows) > 5
    for truth, *columns in rows:
        for verdict, answers in zip((1.0, 0.0), columns, strict=True):
            for stated in re.findall("`([^`]+)`", answers):
                assert accuracy(f"<answer>{stated}</answer>", truth) == verdict, stated


@pytest.mark.parametrize(
    ("policy", "text", "verdict"),
    [
        ("strict", "The answer is 25", 0),
        ("strict", "<answer> 25", 0),
        ("whole_text", "The answer is 25", 1),
        ("whole_text", "<think> 24 or 26 </think> 25°", 1),
        ("whole_text", "<think> 24 or 26 </think> <answer> 25", 1),
        ("whole_text", "I first thought 24, now 25", 0),
        ("whole_text", "", 0),
        ("last_number", "I first thought 24, now 25, surely.", 1),
        ("last_number", "I first thought 25, now 24.", 0),
        ("last_number", "1,025 - 1,000 = 25.0", 1),
        ("last_number", "so it is 50/2.", 1),
        ("last_number", "25" + " x" * 10**6, 0),
        ("last_number", "none", 0),
    ],
)
def test_an_answer_without_a_tag_is_graded_by_the_policy(policy: str, text: str, verdict: int) -> None:
    with Grader(replace(REWARD, without_tag=policy)) as grader:
        assert grader.accuracy(text, "25") == verdict


@pytest.mark.parametrize("policy", WITHOUT_TAG)
def test_no_policy_reads_outside_an_existing_tag(policy: str) -> None:
    assert stated_text("24 <answer>25</answer> 26", policy) == "25"


def test_an_untagged_answer_is_counted() -> None:
    with Grader(REWARD) as grader:
        grader.accuracy("25", "25")
        assert grader.counts == {"untagged": 1}


def test_the_configuration_knows_exactly_these_policies() -> None:
    assert set(NAMES) == set(WITHOUT_TAG)
