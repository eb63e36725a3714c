"""Attention within each of many images, or windows, whose patches lie one after the other: one kernel for all."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from othink_ray.core.flex import BLOCK, OPTIONS, block_mask, compiled


class PackedImages:
    """Which patches see each other, prepared once per pass of a vision tower and used in every layer.

    Nothing is read back from the device, here or in `__call__`, so the host never waits for it.
    """

    def __init__(self, bounds: Tensor, device: torch.device) -> None:
        """`bounds` (images + 1,), on the CPU: where each image starts and where the last one ends; none is empty."""
        lengths = bounds.diff()
        image_of = torch.arange(len(lengths)).repeat_interleave(lengths).to(device, non_blocking=True)

        def sees(_batch: Tensor, _head: Tensor, viewer: Tensor, seen: Tensor) -> Tensor:
            return image_of[viewer] == image_of[seen]

        patches = len(image_of)
        # The bounds of all patches as if they were one image; no tensor, as it is to be read in every layer.
        self.whole = np.array([0, patches])
        self.mask = block_mask(*_blocks(image_of, len(lengths)), sees, patches)
        self.attend = _kernel(device.type)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """(1, heads, N, D), three times -> (1, N, heads, D)."""
        attended: Tensor = self.attend(query, key, value, self.mask, scale)
        return attended.transpose(1, 2)


def _blocks(image_of: Tensor, images: int) -> tuple[Tensor, Tensor]:
    """Twice (B, B): pairs of blocks in which some patches see each other, and pairs in which all do.

    Images lie in order, so those of a block are a range: it takes no mask of all pairs of patches to compare two.
    """
    # What the last block lacks belongs to no image, and so it is never one in which all see all.
    filled = pad(image_of, (0, -len(image_of) % BLOCK), value=images)
    first, last = filled[:: BLOCK], filled[BLOCK - 1 :: BLOCK]
    meet = (first[:, None] <= last) & (first <= last[:, None])
    alike = (first[:, None] == last) & (first == last[:, None])
    return meet & ~alike, alike


@cache
def _kernel(device_type: str) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Any, scale: float) -> Any:
        return flex_attention(query, key, value, block_mask=mask, scale=scale, kernel_options=OPTIONS)

    return compiled(attend, device_type)
