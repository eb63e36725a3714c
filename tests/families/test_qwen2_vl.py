"""Qwen2-VL's own rules, held against the library's model and processor."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from othink_ray.config.schema import Config
from othink_ray.engines.policy import Policy
from othink_ray.families.base import Family
from othink_ray.families.parts import modules_by_part
from othink_ray.types import Message, Prompt
from tests.engines.samples import ask, picture

SIZES = [(84, 84), (28, 28), (1, 1), (2, 1), (27, 29), (5, 190), (1000, 6), (500, 500), (333, 77), (112, 112), (56, 28)]
REPEATABLE = settings(
    deadline=None, derandomize=True, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def decoded(images: Sequence[bytes]) -> list[Image.Image]:
    return [Image.open(io.BytesIO(image)).convert("RGB") for image in images]


def test_a_skeleton_is_the_network_without_its_numbers(family: Family, policy: Policy) -> None:
    skeleton = {name: tuple(one.shape) for name, one in family.skeleton().named_parameters() if one.is_meta}
    assert skeleton == {name: tuple(one.shape) for name, one in policy.network.named_parameters()}


def test_every_weight_is_of_one_part(family: Family, policy: Policy) -> None:
    parts = {
        f"{path}.{name}": part
        for part, path, module in modules_by_part(family, policy.network)
        for name, _ in module.named_parameters(recurse=False)
    }
    for name, _ in policy.network.named_parameters():
        expected = "projector" if "visual.merger." in name else "vision" if "visual." in name else "text"
        assert parts[name] == expected, name
    assert set(parts.values()) == {"text", "vision", "projector"}


@pytest.fixture(scope="module")
def processor(model_folder: Path, config: Config) -> Any:
    """The library's, opened without our code."""
    return AutoProcessor.from_pretrained(
        model_folder, min_pixels=config.model.min_pixels, max_pixels=config.model.max_pixels
    )


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_token_counts_from_sizes_are_those_of_the_encoded_image(
    family: Family, processor: Any, width: int, height: int
) -> None:
    image = picture(width, height, 0)
    [count] = family.image_token_counts([image])
    encoded = processor.image_processor(images=decoded([image]), return_tensors="pt")
    assert count == int(encoded["image_grid_thw"].prod()) // 4
    assert count == family.tokens_of(family.encode_images([image]))


@pytest.mark.parametrize(("width", "height"), [(1, 1), (27, 29), (84, 84), (333, 77), (5000, 4000)])
def test_pixel_bounds_hold_for_any_size_of_ordinary_shape(
    family: Family, config: Config, width: int, height: int
) -> None:
    [count] = family.image_token_counts([picture(width, height, 0)])
    assert config.model.min_pixels <= 784 * count <= config.model.max_pixels


def test_images_are_encoded_as_the_processor_encodes_them(family: Family, processor: Any) -> None:
    images = [picture(width, height, seed) for seed, (width, height) in enumerate(SIZES)]
    own = family.encode_images(images)
    theirs = processor(text=["<|image_pad|>" * len(images)], images=decoded(images), return_tensors="pt")
    assert torch.equal(own.pixels, theirs["pixel_values"])
    assert torch.equal(own.grids, theirs["image_grid_thw"])
    assert family.tokens_of(own) == sum(family.image_token_counts(images))


@pytest.mark.parametrize("mode", ["RGBA", "P", "L", "CMYK"])
def test_images_of_any_mode_are_read_as_colours(family: Family, mode: str) -> None:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(picture(84, 84, 0))).convert(mode).save(buffer, format="TIFF" if mode == "CMYK" else "PNG")
    image = buffer.getvalue()
    assert family.tokens_of(family.encode_images([image])) == family.image_token_counts([image])[0] == 9


def test_a_prompt_without_images_has_no_pixels(family: Family) -> None:
    nothing = family.encode_images([])
    assert (family.tokens_of(nothing), family.image_token_counts([])) == (0, [])
    assert nothing.grids.shape == (0, 3)


def test_expanded_prompts_are_those_of_the_processor(family: Family, processor: Any) -> None:
    prompts = [
        ask("a", picture(84, 84, 0)),
        ask("b"),
        ask("c", picture(300, 40, 1), picture(56, 56, 2)),
    ]
    for prompt in prompts:
        content = [{"type": "image"}] * len(prompt.images) + [{"type": "text", "text": prompt.messages[0].text}]
        chat = [{"role": "user", "content": content}]
        text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        theirs = processor(text=[text], images=decoded(prompt.images) or None, return_tensors="pt")
        counts = family.image_token_counts(prompt.images)
        assert family.expand(family.prompt_token_ids(prompt), counts) == theirs["input_ids"][0].tolist()
        assert family.prompt_token_ids(prompt).count(family.image_token_id) == len(prompt.images)


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
    first, second = (place for place, token in enumerate(ids) if token == family.image_token_id)
    assert "How many?" in family.decode([ids[first:second]])[0]


@st.composite
def mixes(draw: st.DrawFn) -> tuple[list[tuple[int, int]], list[int]]:
    """Sizes of images, and how many words stand before, between and after them; images may touch."""
    sizes = draw(st.lists(st.tuples(st.integers(10, 250), st.integers(10, 250)), max_size=4))
    words = draw(st.lists(st.integers(0, 6), min_size=len(sizes) + 1, max_size=len(sizes) + 1))
    words[0] += 1
    return sizes, words


@pytest.fixture(scope="module")
def library_network(model_folder: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(model_folder)


@REPEATABLE
@given(mixes())
def test_positions_are_those_of_the_library(
    family: Family, library_network: Any, mix: tuple[list[tuple[int, int]], list[int]]
) -> None:
    sizes, words = mix
    images = family.encode_images([picture(width, height, 0) for width, height in sizes])
    counts = [int(grid.prod()) // 4 for grid in images.grids]
    start, end = family.encode_text("<|vision_start|>")[0], family.encode_text("<|vision_end|>")[0]
    ids = [100] * words[0]
    for count, after in zip(counts, words[1:], strict=True):
        ids += [start, *[family.image_token_id] * count, end, *[200] * after]
    token_ids = torch.tensor(ids)
    theirs, _ = library_network.model.get_rope_index(
        token_ids[None],
        mm_token_type_ids=(token_ids == family.image_token_id).long()[None],
        image_grid_thw=images.grids if sizes else None,
        attention_mask=torch.ones_like(token_ids)[None],
    )
    assert torch.equal(family.prompt_positions(token_ids, images), theirs[:, 0])


def test_the_smallest_image_is_encodable_and_cheap(family: Family, config: Config) -> None:
    assert family.image_token_counts([family.smallest_image()]) == [config.model.min_pixels // 784]


def test_banned_tokens_are_the_ones_that_stand_for_pixels(family: Family) -> None:
    names = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
    assert sorted(family.banned_token_ids) == sorted(family.encode_text("".join(names)))
    assert family.image_token_id in family.banned_token_ids
    assert not {family.eos_token_id, family.pad_token_id} & set(family.banned_token_ids)


def test_decoded_answers_hold_no_special_tokens(family: Family) -> None:
    ids = [*family.encode_text("three"), family.eos_token_id]
    assert family.decode([ids, ids[:-1], []]) == ["three", "three", ""]


def test_a_saved_network_loads_as_it_was(family: Family, policy: Policy, config: Config, tmp_path: Path) -> None:
    from othink_ray.families import open_family

    state = {name: parameter.detach() + 1 for name, parameter in policy.network.named_parameters()}
    family.save(tmp_path, policy.network, state)
    again = open_family(config.model, str(tmp_path))
    for name, parameter in again.load_network(torch.float32).named_parameters():
        assert torch.equal(parameter, state[name]), name
    prompt = ask("a", picture(84, 84, 0))
    assert again.prompt_token_ids(prompt) == family.prompt_token_ids(prompt)
    assert again.banned_token_ids == family.banned_token_ids


def test_images_of_many_patches_look_the_same_to_the_untouched_network(family: Family, model_folder: Path) -> None:
    """Ours attends in blocks and projects patches by a product."""
    images = family.encode_images([picture(640, 600, 1), picture(84, 56, 2)])
    untouched = AutoModelForImageTextToText.from_pretrained(model_folder, dtype=torch.float32)
    own = family.load_network(torch.float32)
    expected = untouched.model.visual(images.pixels, grid_thw=images.grids).pooler_output
    found = family.image_features(own, images)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0))
    for features in (found, expected):
        (features * direction).sum().backward()
    for (name, mine), theirs in zip(
        own.model.visual.named_parameters(), untouched.model.visual.parameters(), strict=True
    ):
        torch.testing.assert_close(
            mine.grad, theirs.grad, atol=1e-4, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}"
        )
