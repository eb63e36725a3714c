"""Behavior specific to InternVL; the contract of all families is in tests/contracts/families/."""

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
from othink_ray.families.base import Family
from othink_ray.families.hugging_face import IMAGE_ATTENTION
from tests.engines.samples import ask, picture
from tests.families.checkpoints import build_checkpoint

TILE = 56 * 56  # pixels, four tokens


@pytest.fixture(scope="module")
def model(config: Config, texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    folder = tmp_path_factory.mktemp("internvl")
    build_checkpoint("internvl", folder, texts)
    return replace(config.model, family="internvl", path=str(folder), tiny=None)


def open_with(model: ModelConfig, min_pixels: int, max_pixels: int) -> Family:
    return open_family(replace(model, min_pixels=min_pixels, max_pixels=max_pixels), str(model.path))


@pytest.mark.parametrize(
    ("min_pixels", "max_pixels", "size", "tiles"),
    [
        (TILE, 4 * TILE, (20, 20), 1),
        (TILE, 4 * TILE, (500, 500), 5),  # the fifth is the thumbnail
        (TILE, 4 * TILE, (500, 60), 5),
        (TILE, 2 * TILE, (500, 260), 3),
        (TILE, 2 * TILE - 1, (500, 260), 1),
        (2 * TILE, 4 * TILE, (20, 20), 5),
        (2 * TILE, 2 * TILE, (20, 40), 3),
    ],
)
def test_pixel_bounds_count_whole_tiles_without_the_thumbnail(
    model: ModelConfig, min_pixels: int, max_pixels: int, size: tuple[int, int], tiles: int
) -> None:
    family, image = open_with(model, min_pixels, max_pixels), picture(*size, seed=0)
    assert family.image_token_counts([image]) == [4 * tiles]
    assert family.encode_images([image]).pixels.shape == (tiles, 3, 56, 56)


def test_max_pixels_below_one_tile_is_rejected(model: ModelConfig) -> None:
    with pytest.raises(
        ModelError, match=rf"^model\.max_pixels = {TILE - 1} must be at least {TILE}: .* 56 x 56 pixels; set .*={TILE}"
    ):
        open_with(model, 1, TILE - 1)


def test_image_delimiters_count_towards_the_length(model: ModelConfig, config: Config) -> None:
    family, prompt = open_with(model, TILE, TILE), ask("row", picture(84, 84, 0))
    length = len(family.prompt_token_ids(prompt)) + 2 + 4 - 1
    rollout = replace(config.rollout, max_tokens=20, max_model_len=length + 20)
    family.check_fits(rollout, prompt)
    with pytest.raises(BadRow, match=rf"{length - 4} text tokens, 4 image tokens and .* add up to {length + 21}"):
        family.check_fits(replace(rollout, max_tokens=21), prompt)


def test_block_attention_over_real_tiles_equals_sdpa() -> None:
    """Real tiles have 1025 patches; those of the small checkpoint have too few for block attention."""
    torch.manual_seed(0)
    settings = InternVLVisionConfig(
        hidden_size=64, intermediate_size=96, num_attention_heads=2, num_hidden_layers=2, layer_scale_init_value=1.0
    )
    reference: Any = InternVLVisionModel._from_config(settings, attn_implementation="sdpa")
    tower: Any = InternVLVisionModel._from_config(settings, attn_implementation=IMAGE_ATTENTION)
    tower.load_state_dict(reference.state_dict())
    tiles = torch.randn(3, 3, 448, 448)
    expected, found = (each(tiles).last_hidden_state for each in (reference, tower))
    assert_close(found, expected, atol=1e-5, rtol=1e-5)
    direction = torch.randn(expected.shape)
    for states in (expected, found):
        (states * direction).sum().backward()
    for parameter, original in zip(tower.parameters(), reference.parameters(), strict=True):
        assert_close(parameter.grad, original.grad, atol=1e-3, rtol=1e-3)
