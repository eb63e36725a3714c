"""Lets transformers' models attend the way a line asks: what they pass on as their mask is the attention itself."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from othink_ray.core.attention import Attention

LINE_ATTENTION = "line"


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Attention | Tensor | None,
    scaling: float | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """With a plain mask, or none, the network is the unmodified one."""
    if attention_mask is None or isinstance(attention_mask, Tensor):
        attended, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **settings)
        return attended, None
    return attention_mask(query, key, value, scaling), None


AttentionInterface.register(LINE_ATTENTION, _attend)
AttentionMaskInterface.register(LINE_ATTENTION, sdpa_mask)
