"""Attention within each of many images, or windows, whose patches lie one after the other: one kernel for all."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

_BLOCK = 128  # patches a side of the squares that the kernel skips, or computes without looking at the mask


class PackedImages:
    """Which patches see each other, prepared once per pass of a vision tower and used in every layer.

    Nothing is read back from the device, here or in `__call__`, so the host never waits for it.
    """

    def __init__(self, bounds: Tensor, device: torch.device) -> None:
        """`bounds` (images + 1,), on the CPU: where each image starts and where the last one ends; none is empty."""
        from torch.nn.attention.flex_attention import BlockMask

        lengths = bounds.diff()
        image_of = torch.arange(len(lengths)).repeat_interleave(lengths).to(device, non_blocking=True)

        def sees(_batch: Tensor, _head: Tensor, viewer: Tensor, seen: Tensor) -> Tensor:
            return image_of[viewer] == image_of[seen]

        patches = len(image_of)
        some, all_ = _blocks(image_of, len(lengths))
        # The bounds of all patches as if they were one image; no tensor, as it is to be read in every layer.
        self.whole = np.array([0, patches])
        self.mask = BlockMask.from_kv_blocks(
            *_listed(some), *_listed(all_), BLOCK_SIZE=_BLOCK, mask_mod=sees, seq_lengths=(patches, patches)
        )
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
    filled = pad(image_of, (0, -len(image_of) % _BLOCK), value=images)
    first, last = filled[::_BLOCK], filled[_BLOCK - 1 :: _BLOCK]
    meet = (first[:, None] <= last) & (first <= last[:, None])
    alike = (first[:, None] == last) & (first == last[:, None])
    return meet & ~alike, alike


def _listed(pairs: Tensor) -> tuple[Tensor, Tensor]:
    """(1, 1, B) how many blocks each one meets, and (1, 1, B, B) which, these first."""
    chosen = pairs[None, None].int()
    return chosen.sum(dim=-1, dtype=torch.int32), chosen.argsort(dim=-1, descending=True, stable=True).int()


@cache
def _kernel(device_type: str) -> Callable[..., Any]:
    """Compiled on GPUs for any number of patches; on CPUs it runs as plain operations, for comparison."""
    from torch.nn.attention.flex_attention import flex_attention

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Any, scale: float) -> Any:
        # The same kernel for fewer than 128 patches, for which torch would take one that splits keys among processors.
        options: Any = {"FORCE_USE_FLEX_ATTENTION": True}
        return flex_attention(query, key, value, block_mask=mask, scale=scale, kernel_options=options)

    # Where it cannot be compiled this raises; torch would otherwise go on without a kernel, and write all scores out.
    return torch.compile(attend, dynamic=True, fullgraph=True) if device_type == "cuda" else attend
