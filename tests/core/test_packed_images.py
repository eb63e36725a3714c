"""Packed images: attention against one call per image, and when images are packed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from othink_ray.core.attention import DenseAttention, FlexAttention, packs_images
from othink_ray.core.flex import PackedImages
from othink_ray.core.packed_sequence import build_packed_sequence

CPU = torch.device("cpu")


def packed(lengths: list[int]) -> PackedImages:
    return PackedImages(torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()]), CPU)


def test_whole_has_the_bounds_of_a_single_image() -> None:
    assert packed([60, 40, 28]).whole.tolist() == [0, 128]


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("width", [64, 72, 80])
def test_each_image_is_attended_to_separately(width: int, dtype: torch.dtype, near: float) -> None:
    lengths = [4, 150, 1, 64, 129]
    draw = torch.Generator().manual_seed(0)
    states = [torch.randn(1, 2, sum(lengths), width, generator=draw).to(dtype) for _ in range(3)]

    def alone(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return scaled_dot_product_attention(query, key, value, scale=0.3).transpose(1, 2)

    each = zip(*(tensor.split(lengths, dim=2) for tensor in states), strict=True)
    expected = torch.cat([alone(*image) for image in each], dim=1)
    found = packed(lengths)(states[0], states[1], states[2], 0.3)
    assert found.dtype == dtype
    assert (found - expected).abs().max() < near
    assert (alone(states[0], states[1], states[2]) - expected).abs().max() > 10 * near


def test_images_are_packed_only_with_flex_on_cuda() -> None:
    sequence = build_packed_sequence([torch.tensor([0, 0, 1], dtype=torch.int32).numpy()])
    flex, dense = FlexAttention(sequence, CPU), DenseAttention(sequence, CPU)
    assert packs_images(flex, torch.device("cuda", 0))
    assert not packs_images(flex, CPU)
    assert not packs_images(flex, torch.device("meta"))
    assert not packs_images(dense, torch.device("cuda", 0))
