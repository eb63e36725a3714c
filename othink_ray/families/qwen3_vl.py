"""Qwen3-VL: what the vision tower sees at several depths goes into as many of the first text layers (DeepStack)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from othink_ray.families.base import ImageTensors
from othink_ray.families.qwen_vl import QwenVL


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
