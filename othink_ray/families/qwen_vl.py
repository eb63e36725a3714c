"""Keyword arguments of the vision towers of Qwen-VL, computed on the CPU from the grids of the images.

Left to themselves the towers read grids and lengths back from the device, the lengths in every layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

from othink_ray.core.flex import PackedImages
from othink_ray.data.images import decoded, size_of
from othink_ray.families.base import ImageTensors
from othink_ray.families.hugging_face import HuggingFaceFamily, black_square


class _Packed:
    """Before the attention of any of the towers: it may be given `PackedImages` in the place of cumulative lengths."""

    def forward(self, hidden_states: Tensor, cu_seqlens: Any, **settings: Any) -> Tensor:
        if isinstance(cu_seqlens, PackedImages):
            settings["images"], cu_seqlens = cu_seqlens, cu_seqlens.whole
        attended: Tensor = super().forward(hidden_states, cu_seqlens=cu_seqlens, **settings)  # type: ignore[misc]
        return attended


def accept_packed(tower: Any) -> None:
    """Let all layers of the tower attend to all images, or windows, at once."""
    for block in tower.blocks:
        plain = type(block.attn)
        block.attn.__class__ = type(f"Packed{plain.__name__}", (_Packed, plain), {})


def tower_inputs(tower: nn.Module, grids: Tensor, device: torch.device, *, packed: bool) -> dict[str, Any]:
    """The keywords of a pass over images of these `grids` (images, 3), on the CPU; `packed` as `accept_packed` has it.

    Cumulative lengths are left on the CPU where they are not packed: the layers want them there.
    """
    settings: Any = tower
    merge: int = settings.spatial_merge_size
    on_device = {"position_ids": get_vision_position_ids(grids, merge)}
    bounds = {"cu_seqlens": get_vision_cu_seqlens(grids)}
    if hasattr(tower, "window_size"):  # Qwen2.5-VL
        on_device["window_index"], bounds["cu_window_seqlens"] = get_vision_window_index(
            grids, merge, settings.window_size, settings.patch_size
        )
    if hasattr(tower, "num_grid_per_side"):  # Qwen3-VL
        on_device["interp_indices"], on_device["interp_weights"] = get_vision_interpolation_indices_and_weights(
            grids,
            settings.num_grid_per_side,
            mode=settings.interpolation_mode,
            align_corners=settings.interpolation_align_corners,
            spatial_merge_size=merge,
        )
    # A copy that the host does not wait for: the pass that reads it is queued behind it.
    moved = {name: tensor.to(device, non_blocking=True) for name, tensor in on_device.items()}
    return moved | {name: PackedImages(own, device) if packed else own for name, own in bounds.items()}


class _PatchProjection(nn.Conv3d):
    """A convolution whose kernel is as large as what it is given: a matrix product, and several times as quick."""

    def forward(self, patches: Tensor) -> Tensor:
        return linear(patches.flatten(1), self.weight.flatten(1), self.bias)


class QwenVL(HuggingFaceFamily):
    """Any Qwen-VL, bound to a Hugging Face folder or hub name; as it stands it is Qwen2-VL and Qwen2.5-VL."""

    vision_tokens = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")

    def __init__(self, path: str, *, min_pixels: int, max_pixels: int) -> None:
        super().__init__(path, {"min_pixels": min_pixels, "max_pixels": max_pixels})
        self.merge: int = self.processor.image_processor.merge_size

    def encode_images(self, images: Sequence[bytes]) -> ImageTensors:
        if not images:
            return ImageTensors(pixels=torch.empty(0, 0), grids=torch.empty(0, 3, dtype=torch.long))
        encoded = self.processor.image_processor(images=[decoded(image) for image in images], return_tensors="pt")
        return ImageTensors(pixels=encoded["pixel_values"], grids=encoded["image_grid_thw"])

    def smallest_image(self) -> bytes:
        return black_square(self.processor.image_processor.patch_size * self.merge)

    def image_token_counts(self, images: Sequence[bytes]) -> list[int]:
        sizes = [size_of(image) for image in images]
        patches = [
            self.processor.image_processor.get_number_of_image_patches(height, width, {}) for width, height in sizes
        ]
        return [count // self.merge**2 for count in patches]

    def tokens_of(self, images: ImageTensors) -> int:
        return int((images.grids.prod(dim=-1) // self.merge**2).sum())

    def prompt_positions(self, token_ids: Tensor, images: ImageTensors) -> Tensor:
        grids = iter(images.grids.tolist())
        is_image = (token_ids == self.image_token_id).tolist()
        pieces: list[Tensor] = []
        start, index = 0, 0
        while index < len(is_image):
            if is_image[index]:
                frames, height, width = next(grids)
                rows, columns = height // self.merge, width // self.merge
                piece = torch.stack(
                    torch.meshgrid(torch.arange(frames), torch.arange(rows), torch.arange(columns), indexing="ij")
                ).reshape(3, -1)
                step = max(rows, columns)
            else:
                step = next((i for i in range(index, len(is_image)) if is_image[i]), len(is_image)) - index
                piece = torch.arange(step).expand(3, -1)
            pieces.append(piece + start)
            start += step
            index += piece.shape[1]
        return torch.cat(pieces, dim=1)

    def load_network(self, dtype: torch.dtype) -> nn.Module:
        network = super().load_network(dtype)
        tower: Any = self.vision_tower(network)
        tower.patch_embed.proj.__class__ = _PatchProjection
        accept_packed(tower)
        return network

    def image_inputs(self, images: ImageTensors) -> dict[str, Tensor]:
        return {"pixel_values": images.pixels, "image_grid_thw": images.grids}

    def vision_tower(self, network: nn.Module) -> nn.Module:
        body: Any = network.model
        tower: nn.Module = body.visual
        return tower

    def projectors(self, network: nn.Module) -> list[nn.Module]:
        tower: Any = self.vision_tower(network)
        return [tower.merger]

    def layers(self, network: nn.Module) -> list[nn.Module]:
        body: Any = network.model
        return [*body.visual.blocks, *body.language_model.layers]

    def image_features(self, network: nn.Module, images: ImageTensors, *, packed: bool = False) -> Tensor:
        features: Tensor = self._seen(network, images, packed).pooler_output
        return features

    def _seen(self, network: nn.Module, images: ImageTensors, packed: bool) -> Any:
        """What the tower returns."""
        tower: Any = self.vision_tower(network)
        beside = tower_inputs(tower, images.grids, images.pixels.device, packed=packed)
        return tower(images.pixels.type(tower.dtype), grid_thw=images.grids, **beside)


class Qwen3VL(QwenVL):
    """Its image features are (image tokens, H * depths): what stands in for placeholders, then what layers add."""

    def projectors(self, network: nn.Module) -> list[nn.Module]:
        tower: Any = self.vision_tower(network)
        return [tower.merger, tower.deepstack_merger_list]

    def image_features(self, network: nn.Module, images: ImageTensors, *, packed: bool = False) -> Tensor:
        seen = self._seen(network, images, packed)
        return torch.cat([seen.pooler_output, *seen.deepstack_features], dim=-1)

    def _with_images(self, embedded: Tensor, is_image: Tensor, features: Tensor) -> dict[str, Any]:
        shown, *added = features.split(embedded.shape[-1], dim=-1)
        return super()._with_images(embedded, is_image, shown) | {
            "visual_pos_masks": is_image[None],
            "deepstack_visual_embeds": added,
        }
