"""Keyword arguments of the vision towers of Qwen-VL, computed on the CPU from the grids of the images.

Left to themselves the towers read grids and lengths back from the device, the lengths in every layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

from othink_ray.core.packed_images import PackedImages


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
