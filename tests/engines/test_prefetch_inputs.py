"""The cache of prepared prompt inputs: an input is made once, and dropped when it is taken or no longer prepared."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from othink_ray.engines.prefetch import Inputs
from othink_ray.types import Prompt
from tests.engines.samples import MIXED

Cache = tuple[Inputs[str], list[str]]


@pytest.fixture
def cache() -> Cache:
    """An empty cache, and the ids of the prompts whose inputs were made."""
    ids: list[str] = []

    def make(prompt: Prompt) -> str:
        ids.append(prompt.id)
        return f"of {prompt.id}"

    return Inputs(make), ids


@pytest.mark.parametrize("read", [Inputs.get, Inputs.take])
def test_a_prepared_input_is_made_once(cache: Cache, read: Callable[[Inputs[str], Prompt], str]) -> None:
    inputs, ids = cache
    inputs.prefetch(MIXED[:3])
    assert [read(inputs, prompt) for prompt in MIXED] == [f"of {prompt.id}" for prompt in MIXED]
    assert ids == [prompt.id for prompt in MIXED]


def test_preparing_again_reuses_inputs_and_drops_the_rest(cache: Cache) -> None:
    inputs, ids = cache
    inputs.prefetch(MIXED[:3])
    inputs.prefetch(MIXED[1:4])
    assert len(ids) == 4
    inputs.get(MIXED[0])
    assert ids[4:] == [MIXED[0].id]


def test_a_taken_input_is_dropped_from_the_cache(cache: Cache) -> None:
    inputs, ids = cache
    inputs.prefetch(MIXED[:1])
    assert inputs.take(MIXED[0]) == inputs.take(MIXED[0])
    assert ids == [MIXED[0].id] * 2


def test_prompts_of_one_id_with_other_messages_are_distinct() -> None:
    inputs = Inputs(lambda prompt: prompt.messages)
    inputs.prefetch(MIXED[:1])
    other = type(MIXED[0])(id=MIXED[0].id, messages=(), images=(), answer="", task="")
    assert inputs.get(other) == ()
