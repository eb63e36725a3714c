from __future__ import annotations

import numpy as np
import pytest

from othink_ray.config.schema import RewardConfig
from othink_ray.rewards import REWARDS, score_group
from othink_ray.types import Completion, Group, Message, Prompt

RIGHT = "<think> a </think><answer> 3 </answer>"
WRONG = "<think> a </think><answer> 4 </answer>"
LOOSE = "<answer> 3 </answer>"
NOISE = "\0\ud800"


def group(*texts: str) -> Group:
    message = Message(role="user", text="How many?")
    return Group(
        prompt=Prompt(id="rows/0", messages=(message,), images=(), answer="3", task="counting"),
        prompt_token_ids=np.array([1]),
        completions=tuple(
            Completion(
                token_ids=np.array([2]), sampler_logprobs=np.zeros(1, dtype=np.float32), text=text, finish="stop"
            )
            for text in texts
        ),
        version=0,
    )


def weight(alpha: float) -> RewardConfig:
    return RewardConfig(format_weight=alpha, actors=1, timeout_s=1.0)


@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
def test_the_reward_is_accuracy_plus_weighted_format(alpha: float) -> None:
    answers = group(RIGHT, WRONG, LOOSE, NOISE)
    scored = score_group(answers, weight(alpha))
    assert scored.group is answers
    assert scored.rewards.tolist() == [1 + alpha, alpha, 1, 0]
    assert {name: part.tolist() for name, part in scored.parts.items()} == {
        "accuracy": [1, 0, 1, 0],
        "format": [1, 1, 0, 0],
    }
    assert scored.valid.tolist() == [True] * 4


def test_the_arrays_have_their_types() -> None:
    scored = score_group(group(RIGHT), weight(1.0))
    assert str(scored.rewards.dtype) == "float64"
    assert str(scored.valid.dtype) == "bool"
    assert {str(part.dtype) for part in scored.parts.values()} == {"float64"}


def picky(text: str, answer: str) -> float:
    if text == LOOSE:
        raise RecursionError("too deep")
    return float("nan") if text == WRONG else 1.0


@pytest.mark.parametrize("broken", ["accuracy", "format"])
def test_a_failing_reward_costs_only_the_answer_it_failed_on(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REWARDS, broken, picky)
    scored = score_group(group(RIGHT, LOOSE, WRONG, RIGHT), weight(1.0))
    assert scored.valid.tolist() == [True, False, False, True]
    assert scored.rewards.tolist() == [2, 0, 0, 2]
    assert all(part.tolist() == [1, 0, 0, 1] for part in scored.parts.values())
