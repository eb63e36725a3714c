"""Prompts that the engines have no room for are refused by name, before any answer is sampled."""

from __future__ import annotations

from dataclasses import replace

import pytest

from othink_ray.config.schema import Config
from othink_ray.data import BadRow
from othink_ray.families.base import Family, check_fits
from tests.engines.samples import ask, picture


def needed(family: Family, images: tuple[bytes, ...], text: str) -> int:
    prompt = ask("row", *images, text=text)
    return len(family.expand(family.prompt_token_ids(prompt), family.image_token_counts(images)))


def test_a_prompt_that_just_fits_passes_and_one_token_more_is_refused(family: Family, config: Config) -> None:
    prompt = ask("row", picture(84, 84, 0), picture(56, 112, 1))
    length = needed(family, prompt.images, prompt.messages[0].text)
    room = replace(config.rollout, max_tokens=20, max_model_len=length + 20)
    check_fits(family, room, prompt)
    with pytest.raises(
        BadRow,
        match=rf"row row: {length - 17} tokens of text, 17 of images and rollout.max_tokens = 21 "
        rf"are {length + 21}, more than rollout.max_model_len = {length + 20}; raise",
    ):
        check_fits(family, replace(room, max_tokens=21), prompt)


def test_an_image_counts_with_the_tokens_it_has_after_scaling(family: Family, config: Config) -> None:
    small, large = ask("row", picture(56, 56, 0)), ask("row", picture(2000, 2000, 0))
    room = replace(config.rollout, max_tokens=1, max_model_len=needed(family, small.images, small.messages[0].text) + 1)
    check_fits(family, room, small)
    with pytest.raises(BadRow, match="16 of images"):
        check_fits(family, room, large)


def test_more_images_than_the_engines_take_are_refused(family: Family, config: Config) -> None:
    prompt = ask("row", *(picture(56, 56, n) for n in range(3)))
    with pytest.raises(BadRow, match=r"row row: it has 3 images, more than rollout\.max_images = 2; raise"):
        check_fits(family, replace(config.rollout, max_images=2), prompt)


def test_a_question_that_spells_out_a_placeholder_is_refused(family: Family, config: Config) -> None:
    prompt = ask("row", picture(56, 56, 0), text="What is <|image_pad|>?")
    with pytest.raises(BadRow, match=r"its text spells 1 image placeholder\(s\) of the model out"):
        check_fits(family, config.rollout, prompt)
