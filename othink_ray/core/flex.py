"""FlexAttention as the learner calls it: a mask told of by its blocks, and a kernel that is compiled or raises."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

BLOCK = 128  # tokens a side of the squares that the kernel skips, or computes without looking at the mask

# The same kernel below 128 tokens, for which torch would take one that splits keys among processors.
OPTIONS: Any = {"FORCE_USE_FLEX_ATTENTION": True}


def block_mask(some: Tensor, all_: Tensor, sees: Callable[..., Tensor], length: int) -> Any:
    """The `BlockMask` that `create_block_mask` makes of `sees`, without writing the mask of all pairs of tokens out.

    `some` and `all_` (B, B): the pairs of blocks in which some tokens see each other but not all, and in which all do.
    """
    from torch.nn.attention.flex_attention import BlockMask

    return BlockMask.from_kv_blocks(
        *_listed(some), *_listed(all_), BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(length, length)
    )


def compiled(attend: Callable[..., Any], device_type: str) -> Callable[..., Any]:
    """On GPUs a kernel for any number of tokens; on CPUs `attend` itself, plain operations, for comparison.

    Lines and images each have an `attend` of their own: torch compiles one function for eight kinds of input at most,
    and short, long and single-token inputs are three, with gradient and without.
    """
    # Where it cannot be compiled this raises; torch would otherwise go on without a kernel, and write all scores out.
    return torch.compile(attend, dynamic=True, fullgraph=True) if device_type == "cuda" else attend


def _listed(pairs: Tensor) -> tuple[Tensor, Tensor]:
    """(1, 1, B) how many blocks each one meets, and (1, 1, B, B) which, these first."""
    chosen = pairs[None, None].int()
    return chosen.sum(dim=-1, dtype=chosen.dtype), chosen.argsort(dim=-1, descending=True, stable=True).int()


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
    first, last = filled[::BLOCK], filled[BLOCK - 1 :: BLOCK]
    meet = (first[:, None] <= last) & (first <= last[:, None])
    alike = (first[:, None] == last) & (first == last[:, None])
    return meet & ~alike, alike


@cache
def _kernel(device_type: str) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Any, scale: float) -> Any:
        return flex_attention(query, key, value, block_mask=mask, scale=scale, kernel_options=OPTIONS)

    return compiled(attend, device_type)
