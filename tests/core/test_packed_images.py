"""Packed images: the blocks that the kernel is told of, and its attention against one call per image."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask
from torch.nn.functional import scaled_dot_product_attention

from othink_ray.core import packed_images
from othink_ray.core.attention import DenseAttention, FlexAttention, packs_images
from othink_ray.core.line import line_up
from othink_ray.core.packed_images import PackedImages
from tests.gpu.flex_kernels import IMAGES

CPU = torch.device("cpu")
TABLES = [
    f"{full}{axis}_{what}" for axis in ("kv", "q") for full in ("", "full_") for what in ("num_blocks", "indices")
]


def packed(lengths: list[int]) -> PackedImages:
    return PackedImages(torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()]), CPU)


def drawn(seed: int) -> list[int]:
    """Lengths of up to 11 images, short and long, some of whole blocks."""
    draw = torch.Generator().manual_seed(seed)
    count, longest = int(torch.randint(1, 12, (), generator=draw)), (30, 200, 600, 3)[seed % 4]
    lengths = torch.randint(1, longest + 1, (count,), generator=draw)
    return (lengths * 128 if longest == 3 else lengths).tolist()


EDGES = [[127, 1, 128], [1, 127, 127, 129], [128, 1, 126, 1]]  # an image begins or ends one patch beside a block


@pytest.mark.parametrize("lengths", [*map(drawn, range(16)), *EDGES, *map(list, IMAGES)], ids=str)
def test_blocks_are_those_of_the_mask_of_all_pairs(lengths: list[int]) -> None:
    """The operations on a CPU read the mask alone: wrong blocks would be seen on a GPU only."""
    images, patches = packed(lengths), sum(lengths)
    mask = images.mask
    whole = create_block_mask(mask.mask_mod, None, None, patches, patches, device="cpu")
    for name in TABLES:
        own, expected = getattr(mask, name), getattr(whole, name)
        assert own.dtype == expected.dtype, name
        assert torch.equal(own, expected), name
    assert (mask.seq_lengths, mask.BLOCK_SIZE) == (whole.seq_lengths, whole.BLOCK_SIZE)
    assert images.whole.tolist() == [0, patches]


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("width", [64, 72, 80])
def test_each_image_is_attended_to_as_if_alone(width: int, dtype: torch.dtype, near: float) -> None:
    lengths = [4, 150, 1, 64, 129]
    draw = torch.Generator().manual_seed(0)
    states = [torch.randn(1, 2, sum(lengths), width, generator=draw).to(dtype) for _ in range(3)]

    def alone(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return scaled_dot_product_attention(query, key, value, scale=0.3).transpose(1, 2)

    each = zip(*(own.split(lengths, dim=2) for own in states), strict=True)
    expected = torch.cat([alone(*one) for one in each], dim=1)
    found = packed(lengths)(states[0], states[1], states[2], 0.3)
    assert found.dtype == dtype
    assert (found - expected).abs().max() < near
    assert (alone(states[0], states[1], states[2]) - expected).abs().max() > 10 * near


def test_a_kernel_for_cuda_is_compiled_once_for_any_number_of_patches(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(torch, "compile", lambda kernel, **how: asked.append(how) or kernel)
    packed_images._kernel.__wrapped__("cpu")
    assert not asked
    packed_images._kernel.__wrapped__("cuda")
    assert asked == [{"dynamic": True, "fullgraph": True}]


def test_a_kernel_for_cuda_that_cannot_be_compiled_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch would otherwise go on without one, and write all scores out."""

    def uncompilable(query: Tensor, key: Tensor, value: Tensor, **settings: object) -> Tensor:
        torch._dynamo.graph_break()
        return query

    monkeypatch.setattr("torch.nn.attention.flex_attention.flex_attention", uncompilable)
    attend = packed_images._kernel.__wrapped__("cuda")
    state = torch.ones(1, 1, 4, 16)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        attend(state, state, state, None, 1.0)


def test_images_are_packed_beside_a_line_of_flex_on_cuda_alone() -> None:
    line = line_up([torch.tensor([0, 0, 1], dtype=torch.int32).numpy()])
    flex, dense = FlexAttention(line, CPU), DenseAttention(line, CPU)
    assert packs_images(flex, torch.device("cuda", 0))
    assert not packs_images(flex, CPU)
    assert not packs_images(flex, torch.device("meta"))
    assert not packs_images(dense, torch.device("cuda", 0))
