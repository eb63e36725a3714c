"""Scoring of groups: the weighted sum, masked answers, and counts per grading layer."""

from __future__ import annotations

import time
from dataclasses import fields, replace

import numpy as np
import pytest

from othink_ray.config.schema import RewardConfig
from othink_ray.rewards.base import GradingFailed, WeightedReward, score_group
from othink_ray.rewards.grader import Grader
from othink_ray.rewards.registry import REWARDS, weighted_rewards
from othink_ray.types import Completion, Group, Message, Prompt, ScoredGroup
from tests.rewards.conftest import REWARD

RIGHT = "<think> a </think><answer> 3 </answer>"
WRONG = "<think> a </think><answer> 4 </answer>"
LOOSE = "<answer> 3 </answer>"
NOISE = "\0\ud800"


def group(*texts: str, answer: str = "3") -> Group:
    message = Message(role="user", text="How many?")
    return Group(
        prompt=Prompt(id="rows/0", messages=(message,), images=(), answer=answer, task="counting"),
        prompt_token_ids=np.array([1]),
        completions=tuple(
            Completion(
                token_ids=np.array([2]), sampler_logprobs=np.zeros(1, dtype=np.float32), text=text, finish="stop"
            )
            for text in texts
        ),
        version=0,
    )


def score(answers: Group, grader: Grader, config: RewardConfig = REWARD) -> ScoredGroup:
    return score_group(answers, weighted_rewards(config, grader), grader.counts)


def weight(alpha: float) -> RewardConfig:
    return replace(REWARD, format_weight=alpha)


@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
def test_the_reward_is_accuracy_plus_weighted_format(alpha: float, grader: Grader) -> None:
    answers = group(RIGHT, WRONG, LOOSE, NOISE)
    scored = score(answers, grader, weight(alpha))
    assert scored.group is answers
    assert scored.rewards.tolist() == [1 + alpha, alpha, 1, 0]
    assert {name: part.tolist() for name, part in scored.parts.items()} == {
        "accuracy": [1, 0, 1, 0],
        "format": [1, 1, 0, 0],
    }
    assert scored.valid.tolist() == [True] * 4


def test_the_score_arrays_have_their_dtypes(grader: Grader) -> None:
    scored = score(group(RIGHT), grader)
    assert str(scored.rewards.dtype) == "float64"
    assert str(scored.valid.dtype) == "bool"
    assert {str(part.dtype) for part in scored.parts.values()} == {"float64"}


def partly_failing(prompt: Prompt, completion: Completion) -> float:
    if completion.text == LOOSE:
        raise RecursionError("too deep")
    return float("nan") if completion.text == WRONG else 1.0


@pytest.mark.parametrize("broken", ["accuracy", "format"])
def test_a_failing_reward_masks_only_the_answer_it_failed_on(
    broken: str, grader: Grader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(REWARDS, broken, lambda grader: partly_failing)
    scored = score(group(RIGHT, LOOSE, WRONG, RIGHT), grader)
    assert scored.valid.tolist() == [True, False, False, True]
    assert scored.rewards.tolist() == [2, 0, 0, 2]
    assert all(part.tolist() == [1, 0, 0, 1] for part in scored.parts.values())


def test_a_scored_group_counts_its_answers_by_grading_layer(grader: Grader) -> None:
    stated = ["x(x+2)", "x^2+2x", "two", "9^{9^{9^{9}}}", "2x+x^2"]
    answers = group(*[f"<answer>{text}</answer>" for text in stated], "x^2+2x", answer="x^2+2x")
    scored = score(answers, grader)
    assert scored.graded == {"rules": 2, "symbolic": 2, "timeout": 1, "untagged": 1}
    assert scored.parts["accuracy"].tolist() == [1, 1, 0, 0, 1, 0]
    assert scored.valid.all(), "an answer that ran into the time limit is wrong, not masked"
    again = score(group(RIGHT), grader)
    assert again.graded == {"rules": 1}


def test_a_broken_grading_process_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/bin/false")
    with Grader(REWARD) as broken, pytest.raises(GradingFailed):
        score(group("<answer>x+1</answer>", answer="1+x"), broken)


def test_the_configuration_has_a_weight_of_every_reward() -> None:
    weights = {field.name for field in fields(RewardConfig) if field.name.endswith("_weight")}
    assert weights == {f"{name}_weight" for name in (*REWARDS, "custom")}


def test_a_reward_sees_the_images_and_metadata_of_its_prompt(grader: Grader) -> None:
    def image_bytes(prompt: Prompt, completion: Completion) -> float:
        assert (prompt.task, prompt.messages[0].text, prompt.answer) == ("counting", "How many?", "3")
        return sum(map(len, prompt.images)) / len(completion.text)

    answers = group(RIGHT, LOOSE)
    answers = replace(answers, prompt=replace(answers.prompt, images=(b"1234", b"56")))
    terms = [
        *weighted_rewards(weight(0.5), grader),
        WeightedReward(name="image_bytes", weight=-2.0, reward=image_bytes),
    ]
    scored = score_group(answers, terms, grader.counts)
    assert scored.parts["image_bytes"].tolist() == [6 / len(RIGHT), 6 / len(LOOSE)]
    assert scored.rewards.tolist() == pytest.approx([1.5 - 12 / len(RIGHT), 1 - 12 / len(LOOSE)])


def test_a_step_of_counting_answers_is_scored_in_5_ms(grader: Grader) -> None:
    texts = [f"<think> I count {count} items. </think><answer> {count} </answer>" for count in (3, 4, 5, 2, 1, 6, 3, 3)]
    groups = [group(*texts) for _ in range(16)]

    def seconds() -> float:
        started = time.perf_counter()
        for answers in groups:
            score(answers, grader)
        return time.perf_counter() - started

    assert min(seconds() for _ in range(10)) < 0.005
