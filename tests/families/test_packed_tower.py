"""Packed attention in Qwen-VL vision towers equals Hugging Face's loop over images and windows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_mask
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForImageTextToText

from othink_ray.config.schema import Config
from othink_ray.core import flex
from othink_ray.families import open_family
from othink_ray.families.base import Family, ImageTensors
from othink_ray.families.qwen_vl import accept_packed, tower_inputs
from tests.engines.samples import picture
from tests.families.checkpoints import build_checkpoint

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
SIZES = ((84, 84), (300, 40), (56, 168), (28, 28), (140, 196))  # includes windows truncated at an image's edge


@pytest.fixture(scope="module", params=FAMILIES)
def family(
    request: pytest.FixtureRequest, config: Config, texts: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Family:
    folder = tmp_path_factory.mktemp(request.param)
    build_checkpoint(request.param, folder, texts)
    return open_family(replace(config.model, family=request.param, path=str(folder), tiny=None), str(folder))


@pytest.fixture(scope="module")
def images(family: Family) -> ImageTensors:
    encoded = family.encode_images([picture(width, height, seed) for seed, (width, height) in enumerate(SIZES)])
    assert len({tuple(grid) for grid in encoded.grids.tolist()}) == len(SIZES)
    return encoded


def reference_features(family: Any, images: ImageTensors, *, dtype: torch.dtype, rounded: bool) -> Tensor:
    """Return features of the unmodified transformers network; `rounded` rounds its weights to bfloat16 first."""
    network = AutoModelForImageTextToText.from_pretrained(family.path, dtype=dtype, attn_implementation="sdpa")
    if rounded:
        network.bfloat16().to(dtype)
    return features_of(network.model.visual(images.pixels.to(dtype), grid_thw=images.grids))


def features_of(output: Any) -> Tensor:
    return torch.cat([output.pooler_output, *getattr(output, "deepstack_features", [])], dim=-1)


def dense(query: Tensor, key: Tensor, value: Tensor, mask: Any, scale: float) -> Tensor:
    """Attend with the kernel's mask in dense form: FlexAttention has no backward pass on CPUs."""
    visible = create_mask(mask.mask_mod, 1, 1, *mask.seq_lengths, device="cpu")
    return scaled_dot_product_attention(query, key, value, attn_mask=visible, scale=scale)


def with_gradient(images: ImageTensors, features: Callable[[ImageTensors], Tensor]) -> tuple[Tensor, Tensor]:
    """Return float32 features and the pixels' gradient for a random upstream gradient."""
    pixels = images.pixels.clone().requires_grad_()
    found = features(replace(images, pixels=pixels))
    found.backward(torch.randn(found.shape, generator=torch.Generator().manual_seed(1)).to(found.dtype))
    assert pixels.grad is not None
    return found.detach().float(), pixels.grad


def test_packed_features_equal_the_loops_in_float32(family: Family, images: ImageTensors) -> None:
    network = family.load_network(torch.float32)
    with torch.no_grad():
        found = family.image_features(network, images, packed=True)
        assert (found - reference_features(family, images, dtype=torch.float32, rounded=False)).abs().max() < 1e-5
    assert found.abs().max() > 1


def test_packed_features_are_as_exact_as_the_loops_in_bfloat16(family: Family, images: ImageTensors) -> None:
    with torch.no_grad():
        exact = reference_features(family, images, dtype=torch.float32, rounded=True)
        loop = reference_features(family, images, dtype=torch.bfloat16, rounded=False)
        found = family.image_features(family.load_network(torch.bfloat16), images, packed=True)
    assert found.dtype == torch.bfloat16
    assert (found - exact).abs().mean() < 1.2 * (loop - exact).abs().mean()


def test_pixel_gradients_equal_the_loops(family: Family, images: ImageTensors, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uses the dense form of the same mask."""
    monkeypatch.setattr(flex, "_kernel", lambda _device_type: dense)
    exact = with_gradient(
        images, lambda tensors: reference_features(family, tensors, dtype=torch.float32, rounded=True)
    )
    for dtype in (torch.float32, torch.bfloat16):
        network = family.load_network(dtype)
        found = with_gradient(images, partial(family.image_features, network, packed=True))
        loop = with_gradient(images, partial(reference_features, family, dtype=dtype, rounded=False))
        for packed, looped, true in zip(found, loop, exact, strict=True):
            if dtype == torch.float32:
                assert (packed - looped).abs().max() < 1e-5 * looped.abs().max()
            else:
                assert (packed - true).abs().mean() < 1.2 * (looped - true).abs().mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unpacked_features_are_bit_identical_to_the_loops(
    family: Family, images: ImageTensors, dtype: torch.dtype
) -> None:
    network = family.load_network(dtype)
    with torch.no_grad():
        found = family.image_features(network, images)
        looped = features_of(family.vision_tower(network)(images.pixels.to(dtype), grid_thw=images.grids))
    assert torch.equal(found, looped)


class HostReads(TorchFunctionMode):
    """Counts reads of tensor values by the host."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (Tensor.tolist, Tensor.item, Tensor.__int__, Tensor.__bool__, Tensor.__float__)
        return func(*args, **(kwargs or {}))


def tower_of(family: Any, layers: int, device: str) -> Any:
    """Return the learner's vision tower with `layers` layers and uninitialized weights."""
    network = family.meta_network()
    tower = family.vision_tower(network)
    while len(tower.blocks) < layers:
        tower.blocks.append(type(tower.blocks[0])(tower.config).to("meta"))
    accept_packed(tower)
    return tower if device == "meta" else tower.to_empty(device=device)


def reads_of_pass(family: Family, images: ImageTensors, layers: int, device: str, packed: bool) -> int:
    tower = tower_of(family, layers, device)
    inputs = tower_inputs(tower, images.grids, torch.device(device), packed=packed)
    with HostReads() as reads:
        features = features_of(tower(images.pixels.to(device), grid_thw=images.grids, **inputs))
        features.backward(torch.empty_like(features))
    return reads.count


def test_no_layer_synchronizes_with_the_device(family: Family, images: ImageTensors) -> None:
    """Runs forward and backward on the meta device, where reading a value raises."""
    assert [reads_of_pass(family, images, layers, "meta", packed=True) for layers in (4, 8)] == [0, 0]
    fewer, more = (reads_of_pass(family, images, layers, "cpu", packed=False) for layers in (4, 8))
    assert more - fewer == 3 * 4
    tower = tower_of(family, 4, "meta")
    inputs = tower_inputs(tower, images.grids, torch.device("meta"), packed=True)
    lengths = {name: torch.tensor(each.whole).to("meta") for name, each in inputs.items() if name.startswith("cu_")}
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        tower(images.pixels.to("meta"), grid_thw=images.grids, **inputs | lengths)
