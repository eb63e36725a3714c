"""Attention as plain matrix products, block by block of queries: a block's scores stay in the processor's cache.

Backward makes the scores again. Where a fused kernel is as quick as the products are, as on GPUs, nobody needs this.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

WORTH_IT = 512  # tokens; with fewer, the many calls cost more than the products save
_SCORES = 2**19  # of a block without a mask
_CAUSAL = 128  # tokens of a block of which the later half is, on average, computed in vain


def attend_in_blocks(query: Tensor, key: Tensor, value: Tensor, *, scale: float, causal: bool) -> Tensor:
    """(K, N * R, D), R queries a token, and twice (K, N, D) -> (K, N * R, D): K independent attentions."""
    wide = torch.promote_types(query.dtype, torch.float32)
    inputs = [own.to(wide).contiguous() for own in (query, key, value)]
    attended: Tensor = _BlockAttention.apply(*inputs, scale, causal)  # type: ignore[no-untyped-call]
    return attended.to(query.dtype)


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.scale, ctx.causal = scale, causal
        each = query.shape[1] // key.shape[1] if causal else None
        attended = torch.empty_like(query)
        for head, asking, seen in _blocks(query, key, causal):
            shares = _shares(query[head, asking], key[head, seen], scale, each)
            attended[head, asking] = shares @ value[head, seen]
        return attended

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value = ctx.saved_tensors
        each = query.shape[1] // key.shape[1] if ctx.causal else None
        grad_query = torch.empty_like(query)
        # Lying across, so that what each block adds is a few long rows.
        grad_key, grad_value = torch.zeros_like(key.mT), torch.zeros_like(value.mT)
        for head, asking, seen in _blocks(query, key, ctx.causal):
            asked, came = query[head, asking], grad[head, asking]
            shares = _shares(asked, key[head, seen], ctx.scale, each)
            grad_scores = torch._softmax_backward_data(came @ value[head, seen].t(), shares, -1, shares.dtype)
            grad_query[head, asking] = (grad_scores @ key[head, seen]).mul_(ctx.scale)
            grad_key[head, :, seen] += (asked * ctx.scale).t() @ grad_scores
            grad_value[head, :, seen] += came.t() @ shares
        return grad_query, grad_key.mT, grad_value.mT, None, None


def _blocks(query: Tensor, key: Tensor, causal: bool) -> Iterator[tuple[int, slice, slice]]:
    """Head by head the rows that ask and the tokens that they may see; causal rows are the last of those tokens."""
    heads, tokens = key.shape[:2]
    each = query.shape[1] // tokens
    height = _CAUSAL if causal else max(1, _SCORES // (tokens * each))
    for head in range(heads):
        for start in range(0, tokens, height):
            stop = min(start + height, tokens)
            yield head, slice(start * each, stop * each), slice(0, stop if causal else tokens)


def _shares(asked: Tensor, seen: Tensor, scale: float, each: int | None) -> Tensor:
    """How much each row takes of each token. With `each` rows a token, the last tokens' own ones see no future."""
    scores = (asked * scale) @ seen.t()
    if each is not None:
        own = len(asked) // each
        scores[:, -own:] += _future(own, each, scores.dtype, scores.device)
    return torch.softmax(scores, dim=-1)


@lru_cache(maxsize=64)
def _future(tokens: int, each: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(tokens * each, tokens): -inf where a token's rows would see a later token."""
    future = torch.full((tokens, tokens), float("-inf"), dtype=dtype, device=device).triu(1)
    return future.repeat_interleave(each, dim=0)
