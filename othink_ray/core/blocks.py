"""Attention as plain matrix products, block by block of queries: a block's scores stay in the processor's cache.

Backward makes the scores again. Where a fused kernel is as quick as the products are, as on GPUs and on CPUs whose BLAS
suits them, nobody needs this.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from othink_ray.core.packed_sequence import PackedSequence, stretches

ENOUGH = 512  # tokens seen; with fewer, the many calls cost more than the products save
_GAIN = 1.5  # torch's own kernel spares the calls, and reading the scores again
_TRIES = 10
_SCORES = 2**19  # of a block without a mask
_CAUSAL = 128  # tokens of a block of which the later half is, on average, computed in vain


@dataclass(frozen=True, slots=True)
class Block:
    """Tokens that ask, and the stretches of tokens that they see. If `causal`, they are the last of those tokens."""

    asking: slice
    seen: tuple[slice, ...]
    causal: bool


def blocks_of_image(tokens: int) -> list[Block]:
    """All see all."""
    height = max(1, _SCORES // tokens)
    return [Block(asking, (slice(0, tokens),), causal=False) for asking in _cut(0, tokens, height)]


def blocks_of_sequence(line: PackedSequence, *, in_last_layer: bool = False) -> list[Block]:
    """A prompt sees its past, an answer its prompt and its own past; of prompts the last layer's last tokens ask."""
    blocks: list[Block] = []
    prompt = slice(0)
    for start, stop, of_answer in stretches(line):
        if not of_answer:
            prompt = slice(start, stop)
        before = (prompt,) if of_answer else ()
        first = stop - 1 if in_last_layer and not of_answer else start
        blocks += [Block(asking, (*before, slice(start, asking.stop)), True) for asking in _cut(first, stop, _CAUSAL)]
    return blocks


def _cut(start: int, stop: int, height: int) -> list[slice]:
    return [slice(at, min(at + height, stop)) for at in range(start, stop, height)]


def worth_it(tokens: int) -> bool:
    """Whether blocks are quicker than torch's own kernel where so many tokens are seen, on a CPU."""
    return tokens >= ENOUGH and products_gain() >= _GAIN


@cache
def products_gain() -> float:
    """How many times as fast as torch's BLAS, which its kernels use, this process multiplies; measured once."""
    factor = torch.ones(384, 384)
    place = torch.empty_like(factor)
    seconds = [
        (_seconds(lambda: torch.mm(factor, factor, out=place)), _seconds(lambda: torch.mm(factor, factor)))
        for _ in range(_TRIES)
    ]
    return min(by_blas for by_blas, _ in seconds) / min(own for _, own in seconds)


def _seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def attend_in_blocks(query: Tensor, key: Tensor, value: Tensor, blocks: Sequence[Block], scale: float) -> Tensor:
    """(K, N * R, D), R queries a token, and twice (K, N, D) -> (K, N * R, D): K attentions.

    Each token is in one block at most; zeros come out where it is in none.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    inputs = [own.to(wide).contiguous() for own in (query, key, value)]
    attended: Tensor = _BlockAttention.apply(*inputs, blocks, scale)  # type: ignore[no-untyped-call]
    return attended.to(query.dtype)


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, blocks: Sequence[Block], scale: float) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.blocks, ctx.scale = blocks, scale
        each = query.shape[1] // key.shape[1]
        attended = torch.zeros_like(query)
        for head in range(len(key)):
            for block in blocks:
                rows = _rows(block, each)
                shares = _shares(query[head, rows], _seen(key[head], block), block, each, scale)
                attended[head, rows] = shares @ _seen(value[head], block)
        return attended

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value = ctx.saved_tensors
        each = query.shape[1] // key.shape[1]
        grad_query = torch.zeros_like(query)
        # Lying across, so that what each block adds is a few long rows.
        grad_key, grad_value = torch.zeros_like(key.mT), torch.zeros_like(value.mT)
        for head in range(len(key)):
            for block in ctx.blocks:
                rows = _rows(block, each)
                asked, came, seen = query[head, rows], grad[head, rows], _seen(key[head], block)
                shares = _shares(asked, seen, block, each, ctx.scale)
                grad_shares = came @ _seen(value[head], block).t()
                grad_scores = torch._softmax_backward_data(grad_shares, shares, -1, shares.dtype)
                grad_query[head, rows] = (grad_scores @ seen).mul_(ctx.scale)
                _add(grad_key[head], block, (asked * ctx.scale).t() @ grad_scores)
                _add(grad_value[head], block, came.t() @ shares)
        return grad_query, grad_key.mT, grad_value.mT, None, None


def _rows(block: Block, each: int) -> slice:
    return slice(block.asking.start * each, block.asking.stop * each)


def _seen(states: Tensor, block: Block) -> Tensor:
    """Of (N, D) the tokens that a block sees."""
    if len(block.seen) == 1:
        return states[block.seen[0]]
    return torch.cat([states[stretch] for stretch in block.seen])


def _add(total: Tensor, block: Block, columns: Tensor) -> None:
    """To (D, N), where the block's tokens are."""
    widths = [stretch.stop - stretch.start for stretch in block.seen]
    for stretch, own in zip(block.seen, columns.split(widths, dim=1), strict=True):
        total[:, stretch] += own


def _shares(asked: Tensor, seen: Tensor, block: Block, each: int, scale: float) -> Tensor:
    """How much each row takes of each token."""
    scores = (asked * scale) @ seen.t()
    if block.causal:
        own = block.asking.stop - block.asking.start
        scores[:, -own:] += _future(own, each, scores.dtype, scores.device)
    return torch.softmax(scores, dim=-1)


@lru_cache(maxsize=64)
def _future(tokens: int, each: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(tokens * each, tokens): -inf where a token's rows would see a later token."""
    future = torch.full((tokens, tokens), float("-inf"), dtype=dtype, device=device).triu(1)
    return future.repeat_interleave(each, dim=0)
