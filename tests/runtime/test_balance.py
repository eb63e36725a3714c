"""Assignment of prompts to engines by expected work."""

from __future__ import annotations

import random

import numpy as np
import pytest

from othink_ray.runtime import rollout_pool
from othink_ray.runtime.rollout_pool import AnswerLengths, balance
from othink_ray.types import Completion, Group, Prompt
from tests.engines.samples import ask, picture


def answered(prompt: Prompt, *lengths: int) -> Group:
    completions = tuple(
        Completion(
            token_ids=np.zeros(length, np.int64), sampler_logprobs=np.zeros(length, np.float32), text="", finish="stop"
        )
        for length in lengths
    )
    return Group(prompt=prompt, prompt_token_ids=np.zeros(1, np.int64), completions=completions, version=0)


def loads(work: list[float], actors: int) -> list[float]:
    return [sum(work[index] for index in indices) for indices in balance(work, actors)]


def test_every_index_is_assigned_once() -> None:
    work = [random.Random(3).random() for _ in range(50)]
    for actors in (1, 2, 3, 7):
        assert sorted(index for indices in balance(work, actors) for index in indices) == list(range(50))
        assert balance(work, actors) == balance(work, actors)


def test_equal_work_is_assigned_round_robin() -> None:
    assert balance([1.0] * 7, 3) == [[0, 3, 6], [1, 4], [2, 5]]


def test_no_load_exceeds_four_thirds_of_the_optimum() -> None:
    """Graham's bound for longest-first assignment: 4/3 of the optimum, which is at least the mean and the longest."""
    for seed in range(50):
        draw = random.Random(seed)
        work = [draw.paretovariate(1.2) for _ in range(32)]
        for actors in (2, 4, 8):
            assert max(loads(work, actors)) <= 4 / 3 * max(sum(work) / actors, max(work)) + 1e-9


def test_ragged_lengths_balance_better_than_round_robin() -> None:
    work = [64.0 if index % 2 == 0 else 8.0 for index in range(16)]
    assert max(loads(work, 2)) == sum(work) / 2
    assert sum(work[0::2]) == 512 > sum(work) / 2


def test_fewer_prompts_than_actors_leave_some_empty() -> None:
    assert balance([2.0], 3) == [[0], [], []]
    assert balance([], 2) == [[], []]


def test_an_image_counts_as_a_text_of_its_usual_length() -> None:
    text = "x" * (rollout_pool._TOKENS_AN_IMAGE * rollout_pool._CHARACTERS_A_TOKEN)
    work = AnswerLengths().work
    assert work(ask("q", picture(28, 28, seed=0), text=""), 1) == pytest.approx(work(ask("q", text=text), 1))


def test_a_prompts_work_follows_its_last_answer_lengths() -> None:
    lengths = AnswerLengths()
    short, long, new = ask("short"), ask("long"), ask("new")
    lengths.note(answered(short, 4, 6))
    lengths.note(answered(long, 90, 110))
    work = {prompt.id: lengths.work(prompt, 10) for prompt in (short, long, new)}
    assert work["long"] - work["short"] == pytest.approx(10 * 95)
    assert work["new"] - work["short"] == pytest.approx(10 * (52.5 - 5))
    lengths.note(answered(long, 10))
    assert lengths.work(long, 10) - lengths.work(short, 10) == pytest.approx(10 * 5)


def test_an_image_is_some_work_and_less_than_many_answers() -> None:
    lengths = AnswerLengths()
    plain, pictured = ask("plain"), ask("pictured", b"", b"")
    assert 0 < lengths.work(pictured, 8) - lengths.work(plain, 8) < 100


def test_a_long_text_is_a_little_work() -> None:
    """A prompt token (4 characters) counts as 1/8 of an answer token."""
    lengths = AnswerLengths()
    short, long = ask("short", text="a" * 40), ask("long", text="a" * 360)
    assert lengths.work(long, 8) - lengths.work(short, 8) == pytest.approx((360 - 40) / 4 / 8)


def test_the_least_recent_lengths_are_forgotten_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("othink_ray.runtime.rollout_pool._KEPT", 2)
    lengths = AnswerLengths()
    for name, length in (("a", 1), ("b", 2), ("a", 3), ("c", 4)):
        lengths.note(answered(ask(name), length))
    mean = (1 + 2 + 3 + 4) / 4
    for name, expected in (("a", 3), ("b", mean), ("c", 4)):
        nothing = AnswerLengths().work(ask(name), 1)
        assert lengths.work(ask(name), 1) - nothing == pytest.approx(expected)
