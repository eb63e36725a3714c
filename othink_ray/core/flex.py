"""FlexAttention for the learner: block masks built without a mask of all pairs, and kernels that compile or raise."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

BLOCK = 128  # tokens per side of a mask block, which the kernel may skip, or compute without evaluating the mask

# Force the training kernel below 128 tokens too, where torch would choose flex-decoding, which splits the keys.
OPTIONS: Any = {"FORCE_USE_FLEX_ATTENTION": True}


def block_mask(some: Tensor, full: Tensor, sees: Callable[..., Tensor], length: int) -> Any:
    """Return the `BlockMask` that `create_block_mask` builds from `sees`, without materializing all pairs of tokens.

    `some` and `full` (B, B) mark the pairs of blocks in which some but not all tokens attend, and in which all do.
    """
    from torch.nn.attention.flex_attention import BlockMask

    return BlockMask.from_kv_blocks(
        *_counts_and_indices(some),
        *_counts_and_indices(full),
        BLOCK_SIZE=BLOCK,
        mask_mod=sees,
        seq_lengths=(length, length),
    )


def compiled(attend: Callable[..., Any], device_type: str) -> Callable[..., Any]:
    """Return a kernel compiled for any number of tokens on GPUs; on CPUs `attend` itself (eager), for comparison.

    Packed sequences and images each have their own `attend`: torch compiles a function for at most eight kinds of
    input, and each needs six: short, long and single-token inputs, with and without gradient.
    """
    # fullgraph raises if compilation fails; otherwise torch would fall back to eager mode and materialize all scores.
    return torch.compile(attend, dynamic=True, fullgraph=True) if device_type == "cuda" else attend


def _counts_and_indices(pairs: Tensor) -> tuple[Tensor, Tensor]:
    """Return the number of marked key blocks per query block (1, 1, B), and indices (1, 1, B, B), marked ones first."""
    chosen = pairs[None, None].int()
    return chosen.sum(dim=-1, dtype=chosen.dtype), chosen.argsort(dim=-1, descending=True, stable=True).int()


class PackedImages:
    """Attention within each of several packed images, prepared once per vision forward pass and used in every layer.

    Nothing is read back from the device, here or in `__call__`, so the host never waits for it.
    """

    def __init__(self, bounds: Tensor, device: torch.device) -> None:
        """Prepare the mask; `bounds` (images + 1,) on the CPU are the start of each image (none empty) and the end."""
        lengths = bounds.diff()
        image_of = torch.arange(len(lengths)).repeat_interleave(lengths).to(device, non_blocking=True)

        def sees(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return image_of[query] == image_of[key]

        patches = len(image_of)
        # Bounds of all patches as a single image; a NumPy array, because every layer reads it on the host.
        self.whole = np.array([0, patches])
        self.mask = block_mask(*_blocks(image_of, len(lengths)), sees, patches)
        self.attend = _kernel(device.type)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Map query, key and value (1, heads, N, D) to (1, N, heads, D)."""
        attended: Tensor = self.attend(query, key, value, self.mask, scale)
        return attended.transpose(1, 2)


def _blocks(image_of: Tensor, images: int) -> tuple[Tensor, Tensor]:
    """Return two masks (B, B): pairs of blocks in which some but not all patches attend, and pairs in which all do.

    Images are in order, so the images of a block are a range, and comparing ranges needs no mask of all patch pairs.
    """
    # Padding of the last block belongs to no image, so that block never counts as full.
    padded = pad(image_of, (0, -len(image_of) % BLOCK), value=images)
    first, last = padded[::BLOCK], padded[BLOCK - 1 :: BLOCK]
    some = (first[:, None] <= last) & (first <= last[:, None])
    full = (first[:, None] == last) & (first == last[:, None])
    return some & ~full, full


@cache
def _kernel(device_type: str) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Any, scale: float) -> Any:
        return flex_attention(query, key, value, block_mask=mask, scale=scale, kernel_options=OPTIONS)

    return compiled(attend, device_type)
