"""What was made of prompts before they are asked is used, and not kept for longer than that."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from othink_ray.engines.prefetch import Inputs
from othink_ray.types import Prompt
from tests.engines.samples import MIXED

Made = tuple[Inputs[str], list[str]]


@pytest.fixture
def made() -> Made:
    """With the ids of the prompts for which one was made."""
    ids: list[str] = []

    def make(prompt: Prompt) -> str:
        ids.append(prompt.id)
        return f"of {prompt.id}"

    return Inputs(make), ids


@pytest.mark.parametrize("asked", [Inputs.of, Inputs.take])
def test_what_is_prepared_is_made_once(made: Made, asked: Callable[[Inputs[str], Prompt], str]) -> None:
    inputs, ids = made
    inputs.prepare(MIXED[:3])
    assert [asked(inputs, prompt) for prompt in MIXED] == [f"of {prompt.id}" for prompt in MIXED]
    assert ids == [prompt.id for prompt in MIXED]


def test_what_is_prepared_again_is_not_made_again_and_the_rest_is_dropped(made: Made) -> None:
    inputs, ids = made
    inputs.prepare(MIXED[:3])
    inputs.prepare(MIXED[1:4])
    assert len(ids) == 4
    inputs.of(MIXED[0])
    assert ids[4:] == [MIXED[0].id]


def test_who_takes_one_leaves_nothing_behind(made: Made) -> None:
    inputs, ids = made
    inputs.prepare(MIXED[:1])
    assert inputs.take(MIXED[0]) == inputs.take(MIXED[0])
    assert ids == [MIXED[0].id] * 2


def test_two_prompts_of_one_id_are_told_apart_by_what_they_ask() -> None:
    inputs = Inputs(lambda prompt: prompt.messages)
    inputs.prepare(MIXED[:1])
    other = type(MIXED[0])(id=MIXED[0].id, messages=(), images=(), answer="", task="")
    assert inputs.of(other) == ()
