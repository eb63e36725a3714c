"""A reward of the user's own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from othink_ray.config.load import load
from othink_ray.config.schema import RewardConfig
from othink_ray.config.validate import problems
from othink_ray.rewards.custom import load_custom_reward
from othink_ray.rewards.grader import Grader, opened, score_group
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
    said = [
        Completion(token_ids=ids, sampler_logprobs=np.zeros(1, np.float32), text=text, finish="stop") for text in TEXTS
    ]
    prompt = Prompt(id="one", messages=(), images=(), answer="2", task="counting")
    return Group(prompt=prompt, prompt_token_ids=ids, completions=tuple(said), version=0)


def scored(group: Group, reward: RewardConfig) -> tuple[list[float], dict[str, list[float]], list[bool]]:
    own = load_custom_reward(reward.own)
    assert own is not None
    with Grader(reward) as grader:
        found = score_group(group, reward, grader, opened(own))
    return found.rewards.tolist(), {name: part.tolist() for name, part in found.parts.items()}, found.valid.tolist()


def test_it_is_weighed_and_added_to_accuracy_and_format(file: Path, group: Group) -> None:
    reward = load([f"algo.reward.own={file}:brevity", "algo.reward.own_weight=10"]).algo.reward
    brief = [1 / len(text) for text in TEXTS]
    rewards, parts, valid = scored(group, reward)
    assert parts == {"accuracy": [1, 0], "format": [1, 0], "brevity": brief}
    assert rewards == pytest.approx([2 + 10 * brief[0], 10 * brief[1]])
    assert valid == [True, True]
    alone = scored(group, replace(reward, accuracy_weight=0.0, format_weight=0.0))[0]
    assert alone == pytest.approx([10 * one for one in brief])


def test_an_answer_on_which_it_fails_is_masked(file: Path, group: Group) -> None:
    rewards, parts, valid = scored(group, load([f"algo.reward.own={file}:fussy"]).algo.reward)
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
def test_a_function_that_cannot_be_it_is_a_problem_before_the_run(file: Path, function: str, words: str) -> None:
    [problem] = problems(load([f"algo.reward.own={file}:{function}"]), None)
    assert words in " ".join(str(problem).split())


def test_a_file_that_is_not_there_or_no_python_is_a_problem(tmp_path: Path) -> None:
    [absent] = problems(load([f"algo.reward.own={tmp_path}/none.py:brevity"]), None)
    assert "there is no such file here" in str(absent)
    (tmp_path / "broken.py").write_text("def brevity(text, answer:\n")
    [broken] = problems(load([f"algo.reward.own={tmp_path}/broken.py:brevity"]), None)
    assert "must be Python" in str(broken)
