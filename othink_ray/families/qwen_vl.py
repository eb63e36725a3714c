"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL, with vision towers that never synchronize with the device.

The towers of transformers read grids and sequence lengths back from the device, the lengths in every layer. Here their
keyword arguments are computed on the CPU from the image grids.
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
from othink_ray.data.prompts import decode_image, image_size
from othink_ray.families.base import ImageTensors
from othink_ray.families.hugging_face import HuggingFaceFamily, black_square


class _PackedAttention:
    """Mixin before a tower's attention class: accepts `PackedImages` in place of cumulative lengths."""

    def forward(self, hidden_states: Tensor, cu_seqlens: Any, **settings: Any) -> Tensor:
        if isinstance(cu_seqlens, PackedImages):
            settings["images"], cu_seqlens = cu_seqlens, cu_seqlens.whole
        attended: Tensor = super().forward(hidden_states, cu_seqlens=cu_seqlens, **settings)  # type: ignore[misc]
        return attended


def accept_packed(tower: Any) -> None:
    """Make every layer of the tower accept `PackedImages`: one attention call over all images or windows."""
    for block in tower.blocks:
        original = type(block.attn)
        block.attn.__class__ = type(f"Packed{original.__name__}", (_PackedAttention, original), {})


def tower_inputs(tower: nn.Module, grids: Tensor, device: torch.device, *, packed: bool) -> dict[str, Any]:
    """Return the tower's keyword arguments for images of these `grids` (images, 3), which are on the CPU.

    If `packed` (needs `accept_packed`), cumulative lengths become `PackedImages`; else they stay on the CPU, where the
    layers need them.
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
    # Asynchronous copies: the kernels that read them are queued behind them.
    moved = {name: tensor.to(device, non_blocking=True) for name, tensor in on_device.items()}
    return moved | {name: PackedImages(each, device) if packed else each for name, each in bounds.items()}


class _PatchProjection(nn.Conv3d):
    """A convolution whose kernel covers its whole input, computed as a matmul: several times faster."""

    def forward(self, patches: Tensor) -> Tensor:
        return linear(patches.flatten(1), self.weight.flatten(1), self.bias)


class QwenVL(HuggingFaceFamily):
    """Qwen2-VL and Qwen2.5-VL, and the base class of Qwen3-VL; positions have three axes (M-RoPE)."""

    vision_tokens = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")

    def __init__(self, path: str, *, min_pixels: int, max_pixels: int) -> None:
        super().__init__(path, {"min_pixels": min_pixels, "max_pixels": max_pixels})
        self.merge: int = self.processor.image_processor.merge_size

    def encode_images(self, images: Sequence[bytes]) -> ImageTensors:
        if not images:
            return ImageTensors(pixels=torch.empty(0, 0), grids=torch.empty(0, 3, dtype=torch.long))
        encoded = self.processor.image_processor(images=[decode_image(image) for image in images], return_tensors="pt")
        return ImageTensors(pixels=encoded["pixel_values"], grids=encoded["image_grid_thw"])

    def smallest_image(self) -> bytes:
        return black_square(self.processor.image_processor.patch_size * self.merge)

    def image_token_counts(self, images: Sequence[bytes]) -> list[int]:
        sizes = [image_size(image) for image in images]
        patches = [
            self.processor.image_processor.get_number_of_image_patches(height, width, {}) for width, height in sizes
        ]
        return [count // self.merge**2 for count in patches]

    def encoded_token_count(self, images: ImageTensors) -> int:
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
        features: Tensor = self._run_tower(network, images, packed).pooler_output
        return features

    def _run_tower(self, network: nn.Module, images: ImageTensors, packed: bool) -> Any:
        tower: Any = self.vision_tower(network)
        inputs = tower_inputs(tower, images.grids, images.pixels.device, packed=packed)
        return tower(images.pixels.type(tower.dtype), grid_thw=images.grids, **inputs)


class Qwen3VL(QwenVL):
    """Qwen3-VL; image features are (image tokens, H * depths): input embeddings, then the DeepStack features."""

    def projectors(self, network: nn.Module) -> list[nn.Module]:
        tower: Any = self.vision_tower(network)
        return [tower.merger, tower.deepstack_merger_list]

    def image_features(self, network: nn.Module, images: ImageTensors, *, packed: bool = False) -> Tensor:
        output = self._run_tower(network, images, packed)
        return torch.cat([output.pooler_output, *output.deepstack_features], dim=-1)

    def _text_inputs(self, embedded: Tensor, is_image: Tensor, features: Tensor) -> dict[str, Any]:
        image_embeds, *deepstack = features.split(embedded.shape[-1], dim=-1)
        return super()._text_inputs(embedded, is_image, image_embeds) | {
            "visual_pos_masks": is_image[None],
            "deepstack_visual_embeds": deepstack,
        }
