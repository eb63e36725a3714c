"""Custom rewards (algo.reward.custom): weighting, masking and configuration errors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from othink_ray.config.load import load
from othink_ray.config.schema import RewardConfig
from othink_ray.config.validate import problems
from othink_ray.rewards.base import score_group
from othink_ray.rewards.grader import Grader
from othink_ray.rewards.registry import read_custom_reward, weighted_rewards
from othink_ray.types import Completion, Group, Prompt

FILE = """
def brevity(text: str, answer: str) -> float:
    return 1 / len(text)

def fussy(text, answer, *, least=3):
    assert "3" in text
    return float(least)

def lonely(text): return 0.0

def accuracy(text, answer): return 0.0
"""
TEXTS = ("<think> two </think><answer> 2 </answer>", "<answer> 3 </answer>")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(FILE)
    return tmp_path / "mine.py"


@pytest.fixture
def group() -> Group:
    ids = np.zeros(1, np.int64)
    completions = [
        Completion(token_ids=ids, sampler_logprobs=np.zeros(1, np.float32), text=text, finish="stop") for text in TEXTS
    ]
    prompt = Prompt(id="one", messages=(), images=(), answer="2", task="counting")
    return Group(prompt=prompt, prompt_token_ids=ids, completions=tuple(completions), version=0)


def score(group: Group, reward: RewardConfig) -> tuple[list[float], dict[str, list[float]], list[bool]]:
    custom = read_custom_reward(reward.custom)
    assert custom is not None
    with Grader(reward) as grader:
        result = score_group(group, weighted_rewards(reward, grader, custom), grader.counts)
    parts = {name: part.tolist() for name, part in result.parts.items()}
    return result.rewards.tolist(), parts, result.valid.tolist()


def test_a_custom_reward_is_weighted_and_added(file: Path, group: Group) -> None:
    reward = load([f"algo.reward.custom={file}:brevity", "algo.reward.custom_weight=10"]).algo.reward
    brevity = [1 / len(text) for text in TEXTS]
    rewards, parts, valid = score(group, reward)
    assert parts == {"accuracy": [1, 0], "format": [1, 0], "brevity": brevity}
    assert rewards == pytest.approx([2 + 10 * brevity[0], 10 * brevity[1]])
    assert valid == [True, True]
    custom_only = score(group, replace(reward, accuracy_weight=0.0, format_weight=0.0))[0]
    assert custom_only == pytest.approx([10 * value for value in brevity])


def test_an_answer_on_which_a_custom_reward_fails_is_masked(file: Path, group: Group) -> None:
    rewards, parts, valid = score(group, load([f"algo.reward.custom={file}:fussy"]).algo.reward)
    assert valid == [False, True]
    assert (rewards, parts["fussy"]) == ([0, 3], [0, 3])


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("brevty", "defines no function brevty Did you mean"),
        ("lonely", "lonely must take two arguments: a completion's text and the true answer"),
        ("accuracy", "accuracy is the name of a built-in reward"),
    ],
)
def test_an_unusable_function_is_a_configuration_error(file: Path, function: str, words: str) -> None:
    [problem] = problems(load([f"algo.reward.custom={file}:{function}"]), None)
    assert words in " ".join(str(problem).split())


def test_a_missing_or_invalid_file_is_a_configuration_error(tmp_path: Path) -> None:
    [absent] = problems(load([f"algo.reward.custom={tmp_path}/none.py:brevity"]), None)
    assert "but the file does not exist (relative paths start from" in " ".join(str(absent).split())
    (tmp_path / "broken.py").write_text("def brevity(text, answer:\n")
    [broken] = problems(load([f"algo.reward.custom={tmp_path}/broken.py:brevity"]), None)
    assert "must be Python" in str(broken)
