"""FlexAttention as the learner calls it: a mask told of by its blocks, and a kernel that is compiled or raises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

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
