"""What is said of InternVL alone; what all families promise is in tests/contracts/families/."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from transformers import InternVLVisionConfig, InternVLVisionModel

from othink_ray.config.schema import Config, ModelConfig
from othink_ray.data import BadRow
from othink_ray.families import ModelError, open_family
from othink_ray.families.base import Family, check_fits
from othink_ray.families.hugging_face import IMAGE_ATTENTION
from tests.engines.samples import ask, picture
from tests.families.checkpoints import build_checkpoint

TILE = 56 * 56  # pixels, four tokens


@pytest.fixture(scope="module")
def model(config: Config, texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    folder = tmp_path_factory.mktemp("internvl")
    build_checkpoint("internvl", folder, texts)
    return replace(config.model, family="internvl", path=str(folder), tiny=None)


def opened(model: ModelConfig, least: int, most: int) -> Family:
    return open_family(replace(model, min_pixels=least, max_pixels=most), str(model.path))


@pytest.mark.parametrize(
    ("least", "most", "size", "tiles"),
    [
        (TILE, 4 * TILE, (20, 20), 1),
        (TILE, 4 * TILE, (500, 500), 5),  # the fifth shows all of it
        (TILE, 4 * TILE, (500, 60), 5),
        (TILE, 2 * TILE, (500, 260), 3),
        (TILE, 2 * TILE - 1, (500, 260), 1),
        (2 * TILE, 4 * TILE, (20, 20), 5),
        (2 * TILE, 2 * TILE, (20, 40), 3),
    ],
)
def test_pixels_are_counted_in_whole_tiles_and_the_overview_is_not_counted(
    model: ModelConfig, least: int, most: int, size: tuple[int, int], tiles: int
) -> None:
    family, image = opened(model, least, most), picture(*size, seed=0)
    assert family.image_token_counts([image]) == [4 * tiles]
    assert family.encode_images([image]).pixels.shape == (tiles, 3, 56, 56)


def test_less_pixels_than_a_tile_are_refused(model: ModelConfig) -> None:
    with pytest.raises(
        ModelError, match=rf"^model\.max_pixels = {TILE - 1} must be at least {TILE}: .* 56 x 56 pixels; set .*={TILE}"
    ):
        opened(model, 1, TILE - 1)


def test_what_frames_an_image_needs_room_too(model: ModelConfig, config: Config) -> None:
    family, prompt = opened(model, TILE, TILE), ask("row", picture(84, 84, 0))
    length = len(family.prompt_token_ids(prompt)) + 2 + 4 - 1
    room = replace(config.rollout, max_tokens=20, max_model_len=length + 20)
    check_fits(family, room, prompt)
    with pytest.raises(BadRow, match=rf"{length - 4} tokens of text, 4 of images and .* are {length + 21}"):
        check_fits(family, replace(room, max_tokens=21), prompt)


def test_real_tiles_look_the_same_when_attended_in_blocks() -> None:
    """They have 1025 patches each; those of the small checkpoint are too few for blocks."""
    torch.manual_seed(0)
    settings = InternVLVisionConfig(
        hidden_size=64, intermediate_size=96, num_attention_heads=2, num_hidden_layers=2, layer_scale_init_value=1.0
    )
    plain: Any = InternVLVisionModel._from_config(settings, attn_implementation="sdpa")
    own: Any = InternVLVisionModel._from_config(settings, attn_implementation=IMAGE_ATTENTION)
    own.load_state_dict(plain.state_dict())
    tiles = torch.randn(3, 3, 448, 448)
    expected, found = (tower(tiles).last_hidden_state for tower in (plain, own))
    assert_close(found, expected, atol=1e-5, rtol=1e-5)
    direction = torch.randn(expected.shape)
    for states in (expected, found):
        (states * direction).sum().backward()
    for mine, theirs in zip(own.parameters(), plain.parameters(), strict=True):
        assert_close(mine.grad, theirs.grad, atol=1e-3, rtol=1e-3)
