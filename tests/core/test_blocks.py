"""Block attention against the slow result: shapes, numbers of queries per token, and gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from othink_ray.core import blocks
from othink_ray.core.blocks import (
    MIN_KEYS,
    Block,
    attend_in_blocks,
    blocks_are_faster,
    blocks_of_image,
    blocks_of_sequence,
    matmul_gain,
)
from othink_ray.core.packed_sequence import build_packed_sequence

SCALE = 0.3


def blocks_of(tokens: int, causal: bool) -> list[Block]:
    """Return the blocks of a packed sequence that is a single prompt (causal), or of an image."""
    return (
        blocks_of_sequence(build_packed_sequence([np.zeros(tokens, dtype=np.int32)]))
        if causal
        else blocks_of_image(tokens)
    )


def slow_attention(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
    """Compute attention row by row."""
    heads, rows = query.shape[:2]
    each = rows // key.shape[1]
    attended = []
    for head in range(heads):
        for row in range(rows):
            seen = row // each + 1 if causal else key.shape[1]
            probs = torch.softmax(SCALE * key[head, :seen] @ query[head, row], dim=0)
            attended.append(probs @ value[head, :seen])
    return torch.stack(attended).unflatten(0, (heads, rows))


def states(heads: int, tokens: int, each: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Return query, key and value as slices of one tensor, as a fused projection gives them."""
    drawn = torch.randn(
        tokens, heads, each + 2, 4, generator=torch.Generator().manual_seed(tokens), dtype=torch.float64
    )
    whole = drawn.to(dtype).requires_grad_()
    query = whole[:, :, :each].transpose(0, 1).flatten(1, 2)
    return [query, whole[:, :, each].transpose(0, 1), whole[:, :, each + 1].transpose(0, 1)]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("heads", "tokens", "each"), [(1, 1, 1), (2, 5, 1), (1, 8, 3), (3, 13, 2), (2, 16, 1)])
@pytest.mark.parametrize("height", [1, 4, 100])
def test_blocks_of_any_height_give_the_slow_result(
    monkeypatch: pytest.MonkeyPatch, causal: bool, heads: int, tokens: int, each: int, height: int
) -> None:
    monkeypatch.setattr(blocks, "_CAUSAL", height)
    monkeypatch.setattr(blocks, "_SCORES", height * tokens)
    inputs = states(heads, tokens, each)
    found = attend_in_blocks(*inputs, blocks_of(tokens, causal), SCALE)
    expected = slow_attention(*inputs, causal)
    assert_close(found, expected)
    direction = torch.randn_like(expected)
    assert_close(
        torch.autograd.grad((found * direction).sum(), inputs, retain_graph=True),
        torch.autograd.grad((expected * direction).sum(), inputs),
    )


@pytest.mark.parametrize("causal", [False, True])
def test_real_sizes_are_cut_into_several_blocks(causal: bool) -> None:
    tokens = 2 * MIN_KEYS
    query, key, value = states(2, tokens, 3)
    several = blocks_of(tokens, causal)
    assert len(several) >= 2
    found = attend_in_blocks(query, key, value, several, SCALE)
    few = [0, 1, 3 * blocks._CAUSAL, 3 * tokens - 1]
    assert_close(found[:, few], slow_attention_of(few, query, key, value, causal))


def slow_attention_of(rows: list[int], query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
    each = query.shape[1] // key.shape[1]
    attended = []
    for row in rows:
        seen = row // each + 1 if causal else key.shape[1]
        probs = torch.softmax(SCALE * key[:, :seen] @ query[:, row, :, None], dim=1)
        attended.append((probs * value[:, :seen]).sum(1))
    return torch.stack(attended, dim=1)


@pytest.mark.parametrize(("scores", "heights"), [(12, [2, 2, 1]), (3, [1] * 5), (25, [5]), (10**6, [5])])
def test_image_blocks_have_a_bounded_number_of_scores(
    monkeypatch: pytest.MonkeyPatch, scores: int, heights: list[int]
) -> None:
    monkeypatch.setattr(blocks, "_SCORES", scores)
    cut = blocks_of_image(5)
    assert [block.queries.stop - block.queries.start for block in cut] == heights
    assert [block.queries.start for block in cut] == [sum(heights[:number]) for number in range(len(heights))]


def test_half_precision_sums_in_float32() -> None:
    exact = states(2, 40, 2)
    half = [tensor.detach().bfloat16() for tensor in exact]
    found = attend_in_blocks(*half, blocks_of(40, causal=True), SCALE)
    assert found.dtype == torch.bfloat16
    wide = attend_in_blocks(*(tensor.float() for tensor in half), blocks_of(40, causal=True), SCALE)
    assert_close(found, wide.bfloat16(), atol=0, rtol=0)


# ---- where blocks are faster


def test_blocks_are_not_used_where_matmul_is_torchs_blas() -> None:
    assert matmul_gain() < 1.5  # matmul is not replaced in this process
    assert not blocks_are_faster(10 * MIN_KEYS)


@pytest.mark.parametrize(("tokens", "gain", "expected"), [(0, 0.0, True), (-1, 9.0, False), (0, -0.01, False)])
def test_blocks_need_enough_tokens_and_enough_gain(
    monkeypatch: pytest.MonkeyPatch, tokens: int, gain: float, expected: bool
) -> None:
    monkeypatch.setattr(blocks, "matmul_gain", lambda: blocks._GAIN + gain)
    assert blocks_are_faster(MIN_KEYS + tokens) == expected


def test_the_gain_compares_the_fastest_of_both_matmuls(monkeypatch: pytest.MonkeyPatch) -> None:
    """A matmul with `out` times torch's BLAS: it uses torch's implementation even where matmul is replaced."""
    clock, calls = 100.0, 0

    def multiply(left: Tensor, right: Tensor, *, out: Tensor | None = None) -> None:
        nonlocal clock, calls
        clock, calls = clock + (1.0 if out is None else 3.0) + calls, calls + 1

    monkeypatch.setattr(torch, "mm", multiply)
    monkeypatch.setattr(blocks.time, "perf_counter", lambda: clock)
    assert matmul_gain.__wrapped__() == (3.0 + 0) / (1.0 + 1)
