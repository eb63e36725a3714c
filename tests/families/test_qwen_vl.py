"""Behavior specific to Qwen-VL; the contract of all families is in tests/contracts/families/."""

from __future__ import annotations

import io

import pytest
from PIL import Image

from othink_ray.config.schema import Config
from othink_ray.families.base import Family
from othink_ray.types import Message, Prompt
from tests.engines.samples import picture


@pytest.mark.parametrize(("width", "height"), [(1, 1), (27, 29), (84, 84), (333, 77), (5000, 4000)])
def test_pixel_bounds_hold_for_any_size(family: Family, config: Config, width: int, height: int) -> None:
    [count] = family.image_token_counts([picture(width, height, 0)])
    assert config.model.min_pixels <= 784 * count <= config.model.max_pixels


@pytest.mark.parametrize("mode", ["RGBA", "P", "L", "CMYK"])
def test_images_of_any_color_mode_are_encoded(family: Family, mode: str) -> None:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(picture(84, 84, 0))).convert(mode).save(buffer, format="TIFF" if mode == "CMYK" else "PNG")
    image = buffer.getvalue()
    assert family.encoded_token_count(family.encode_images([image])) == family.image_token_counts([image])[0] == 9


def test_a_chat_of_several_turns_keeps_roles_and_images_in_place(family: Family) -> None:
    chat = Prompt(
        id="chat",
        messages=(
            Message(role="system", text="Be brief."),
            Message(role="user", text="How many?", images=1),
            Message(role="assistant", text="3"),
            Message(role="user", text="And here?", images=1),
        ),
        images=(picture(84, 84, 0), picture(84, 84, 1)),
        answer="3",
        task="counting",
    )
    text = family.decode([family.prompt_token_ids(chat)])[0]
    assert text == "system\nBe brief.\nuser\nHow many?\nassistant\n3\nuser\nAnd here?\nassistant\n"
    ids = family.prompt_token_ids(chat)
    first, second = (index for index, token in enumerate(ids) if token == family.image_token_id)
    assert "How many?" in family.decode([ids[first:second]])[0]


def test_the_smallest_image_has_the_fewest_tokens(family: Family, config: Config) -> None:
    assert family.image_token_counts([family.smallest_image()]) == [config.model.min_pixels // 784]


def test_banned_tokens_are_the_vision_tokens(family: Family) -> None:
    names = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
    assert sorted(family.banned_token_ids) == sorted(family.encode_text("".join(names)))
    assert family.image_token_id in family.banned_token_ids
    assert not {family.eos_token_id, family.pad_token_id} & set(family.banned_token_ids)


def test_decoded_answers_hold_no_special_tokens(family: Family) -> None:
    ids = [*family.encode_text("three"), family.eos_token_id]
    assert family.decode([ids, ids[:-1], []]) == ["three", "three", ""]
