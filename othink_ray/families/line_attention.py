"""How transformers' models attend: text the way a line asks, images in blocks where that is quicker.

Text models hand the keyword `line`, the attention itself, down to every layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from othink_ray.core import fused
from othink_ray.core.attention import Attention
from othink_ray.core.blocks import attend_in_blocks, blocks_of_image, worth_it
from othink_ray.core.kernel_memory import kernel_shape
from othink_ray.core.packed_images import PackedImages

LINE_ATTENTION, IMAGE_ATTENTION = "line", "image"


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    line: Attention | None = None,
    in_last_layer: bool = False,
    **settings: Any,
) -> tuple[Tensor, None]:
    """Without a line the network is the unmodified one, mask and all."""
    if line is not None:
        attend = line.in_last_layer if in_last_layer else line
        return attend(query, key, value, scaling), None
    attended, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **settings)
    return attended, None


def _attend_image(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    scaling: float,
    images: PackedImages | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """All patches of an image, or of a tile, among themselves; there may be several of the same size, or `images`."""
    if query.is_meta:
        return kernel_shape(query, key, value), None
    if images is not None:
        return images(query, key, value, scaling), None
    by_kernel = fused.is_chosen() and fused.suits(query)
    # In half precision torch's kernel, which is vLLM's too: it rounds the softmax's shares, and others do not.
    by_torch = query.device.type != "cpu" or query.dtype != torch.float32
    if by_torch or not (by_kernel or worth_it(query.shape[2])):
        attended, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **settings)
        return attended, None
    asked, seen, shown = (heads.flatten(0, 1) for heads in (query, key, value))
    if by_kernel:
        attended = fused.attend_fused(asked, seen, shown, fused.blocks_of_image(query.shape[2]), scaling)
        return attended.unflatten(1, query.shape[:2]).transpose(0, 1), None
    attended = attend_in_blocks(asked, seen, shown, blocks_of_image(query.shape[2]), scaling)
    return attended.view_as(query).transpose(1, 2), None


# Not for torch's compiler: a line is different each time, and an image is many small products.
AttentionInterface.register(LINE_ATTENTION, torch.compiler.disable(_attend))
AttentionInterface.register(IMAGE_ATTENTION, torch.compiler.disable(_attend_image))
AttentionMaskInterface.register(LINE_ATTENTION, sdpa_mask)
