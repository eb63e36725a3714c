"""Prompts that exceed the engines' limits are rejected with their id, before any answer is sampled."""

from __future__ import annotations

from dataclasses import replace

import pytest

from othink_ray.config.schema import Config
from othink_ray.data import BadRow
from othink_ray.families.base import Family
from tests.engines.samples import ask, picture


def needed(family: Family, images: tuple[bytes, ...], text: str) -> int:
    prompt = ask("row", *images, text=text)
    return len(family.expand(family.prompt_token_ids(prompt), family.image_token_counts(images)))


def test_a_prompt_fits_up_to_the_exact_token_limit(family: Family, config: Config) -> None:
    prompt = ask("row", picture(84, 84, 0), picture(56, 112, 1))
    length = needed(family, prompt.images, prompt.messages[0].text)
    rollout = replace(config.rollout, max_tokens=20, max_model_len=length + 20)
    family.check_fits(rollout, prompt)
    with pytest.raises(
        BadRow,
        match=rf"row row: {length - 17} text tokens, 17 image tokens and rollout.max_tokens = 21 "
        rf"add up to {length + 21}, more than rollout.max_model_len = {length + 20}; raise",
    ):
        family.check_fits(replace(rollout, max_tokens=21), prompt)


def test_an_image_counts_its_tokens_after_resizing(family: Family, config: Config) -> None:
    small, large = ask("row", picture(56, 56, 0)), ask("row", picture(2000, 2000, 0))
    length = needed(family, small.images, small.messages[0].text)
    rollout = replace(config.rollout, max_tokens=1, max_model_len=length + 1)
    family.check_fits(rollout, small)
    with pytest.raises(BadRow, match="16 image tokens"):
        family.check_fits(rollout, large)


def test_too_many_images_are_rejected(family: Family, config: Config) -> None:
    prompt = ask("row", *(picture(56, 56, n) for n in range(3)))
    with pytest.raises(BadRow, match=r"row row: it has 3 images, more than rollout\.max_images = 2; raise"):
        family.check_fits(replace(config.rollout, max_images=2), prompt)


def test_a_question_that_contains_a_placeholder_is_rejected(family: Family, config: Config) -> None:
    prompt = ask("row", picture(56, 56, 0), text="What is <|image_pad|>?")
    with pytest.raises(BadRow, match=r"its text contains 1 image placeholder token\(s\) of the model"):
        family.check_fits(config.rollout, prompt)
