"""Attention as plain matmuls over blocks of queries, so that the scores of a block stay in the CPU cache.

The backward pass recomputes the scores. This pays off only where matmuls are faster than torch's fused kernel: not on
GPUs, nor on CPUs that torch's BLAS is tuned for.
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

from othink_ray.core.packed_sequence import PackedSequence, segment_spans

MIN_KEYS = 512  # keys; with fewer, the overhead of many calls exceeds what faster matmuls save
_GAIN = 1.5  # matmul speed-up needed: torch's kernel saves the calls and a second pass over the scores
_TRIES = 10
_SCORES = 2**19  # per block without a mask
_CAUSAL = 128  # queries per causal block, whose upper triangle is computed in vain


@dataclass(frozen=True, slots=True)
class Block:
    """A block of query tokens and the spans of key tokens; if `causal`, the queries are also the last of the keys."""

    queries: slice
    keys: tuple[slice, ...]
    causal: bool


def blocks_of_image(tokens: int) -> list[Block]:
    """Return the blocks of an image, in which every patch attends to every patch."""
    height = max(1, _SCORES // tokens)
    return [Block(queries, (slice(0, tokens),), causal=False) for queries in _cut(0, tokens, height)]


def blocks_of_sequence(sequence: PackedSequence, *, in_last_layer: bool = False) -> list[Block]:
    """Return the causal blocks of a packed sequence: prompts attend to themselves, answers to prompt and themselves.

    In the last layer, the only query of a prompt is its last token.
    """
    blocks: list[Block] = []
    prompt = slice(0)
    for start, stop, of_answer in segment_spans(sequence):
        if not of_answer:
            prompt = slice(start, stop)
        before = (prompt,) if of_answer else ()
        first = stop - 1 if in_last_layer and not of_answer else start
        blocks += [Block(part, (*before, slice(start, part.stop)), True) for part in _cut(first, stop, _CAUSAL)]
    return blocks


def _cut(start: int, stop: int, height: int) -> list[slice]:
    return [slice(at, min(at + height, stop)) for at in range(start, stop, height)]


def blocks_are_faster(tokens: int) -> bool:
    """Return whether blocks are faster than torch's kernel on this CPU, with `tokens` keys."""
    return tokens >= MIN_KEYS and matmul_gain() >= _GAIN


@cache
def matmul_gain() -> float:
    """Measure once how many times faster this process's matmul is than torch's BLAS, which torch's kernels use."""
    factor = torch.ones(384, 384)
    out = torch.empty_like(factor)
    seconds = [
        (_seconds(lambda: torch.mm(factor, factor, out=out)), _seconds(lambda: torch.mm(factor, factor)))
        for _ in range(_TRIES)
    ]
    return min(blas for blas, _ in seconds) / min(matmul for _, matmul in seconds)


def _seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def attend_in_blocks(query: Tensor, key: Tensor, value: Tensor, blocks: Sequence[Block], scale: float) -> Tensor:
    """Compute K attentions: query (K, N * R, D) with R queries per token, key and value (K, N, D) -> (K, N * R, D).

    Each token is a query in at most one block; the output is 0 where it is in none.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    inputs = [states.to(wide).contiguous() for states in (query, key, value)]
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
                probs = _probs(query[head, rows], _keys(key[head], block), block, each, scale)
                attended[head, rows] = probs @ _keys(value[head], block)
        return attended

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value = ctx.saved_tensors
        each = query.shape[1] // key.shape[1]
        grad_query = torch.zeros_like(query)
        # Transposed, so that each block adds to a few long contiguous rows.
        grad_key, grad_value = torch.zeros_like(key.mT), torch.zeros_like(value.mT)
        for head in range(len(key)):
            for block in ctx.blocks:
                rows = _rows(block, each)
                queries, grad_out, keys = query[head, rows], grad[head, rows], _keys(key[head], block)
                probs = _probs(queries, keys, block, each, ctx.scale)
                grad_probs = grad_out @ _keys(value[head], block).t()
                grad_scores = torch._softmax_backward_data(grad_probs, probs, -1, probs.dtype)
                grad_query[head, rows] = (grad_scores @ keys).mul_(ctx.scale)
                _add(grad_key[head], block, (queries * ctx.scale).t() @ grad_scores)
                _add(grad_value[head], block, grad_out.t() @ probs)
        return grad_query, grad_key.mT, grad_value.mT, None, None


def _rows(block: Block, each: int) -> slice:
    return slice(block.queries.start * each, block.queries.stop * each)


def _keys(states: Tensor, block: Block) -> Tensor:
    """Select the block's key tokens from (N, D)."""
    if len(block.keys) == 1:
        return states[block.keys[0]]
    return torch.cat([states[span] for span in block.keys])


def _add(total: Tensor, block: Block, columns: Tensor) -> None:
    """Add columns (D, keys of the block) to total (D, N) at the block's key tokens."""
    widths = [span.stop - span.start for span in block.keys]
    for span, part in zip(block.keys, columns.split(widths, dim=1), strict=True):
        total[:, span] += part


def _probs(queries: Tensor, keys: Tensor, block: Block, each: int, scale: float) -> Tensor:
    """Return the attention probabilities (queries, keys) of a block."""
    scores = (queries * scale) @ keys.t()
    if block.causal:
        tokens = block.queries.stop - block.queries.start
        scores[:, -tokens:] += _future(tokens, each, scores.dtype, scores.device)
    return torch.softmax(scores, dim=-1)


@lru_cache(maxsize=64)
def _future(tokens: int, each: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the causal mask (tokens * each, tokens): -inf where a query would attend to a later token."""
    future = torch.full((tokens, tokens), float("-inf"), dtype=dtype, device=device).triu(1)
    return future.repeat_interleave(each, dim=0)
