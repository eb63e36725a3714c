"""The kernel for CPUs attends as the plain masks do, on every instruction set that this processor has."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from functools import partial
from threading import Event

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from othink_ray.core import fused
from othink_ray.core.attention import DenseAttention, FusedAttention
from othink_ray.core.packed_sequence import PackedSequence
from tests.core.test_line import CPU, REPEATABLE, ROWS, line_of, needed

SCALE = 0.4
LONG = [(100, [63] * 8), (37, [20, 1]), (300, [4])]
HEADS = ((6, 2, 32), (3, 3, 64), (7, 1, 128), (4, 2, 20))  # of queries, of keys, and their width


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def states(line: PackedSequence, heads: int, key_heads: int, width: int) -> list[Tensor]:
    """Query, key and value, token by token in memory as a network makes them."""
    rng = torch.Generator().manual_seed(len(line))
    return [
        torch.randn(1, len(line), own, width, generator=rng).transpose(1, 2).requires_grad_()
        for own in (heads, key_heads, key_heads)
    ]


def assert_as_dense(line: PackedSequence, heads: tuple[int, int, int]) -> None:
    """In all layers and in the last one, forward and backward, to the rounding of float32."""
    own, plain = FusedAttention(line, CPU), DenseAttention(line, CPU)
    kept = needed(line)[None, :, None, None]
    for attend, wanted in ((own, torch.ones_like(kept)), (own.in_last_layer, kept)):
        given = states(line, *heads)
        exact = [one.detach().double().requires_grad_() for one in given]
        found, expected = attend(*given, SCALE) * wanted, plain(*exact, SCALE) * wanted
        direction = torch.randn(found.shape, generator=torch.Generator().manual_seed(0))
        assert_close(found.double(), expected, atol=2e-5, rtol=1e-5)
        gradients = torch.autograd.grad((found * direction).sum(), given)
        for gradient, right in zip(gradients, torch.autograd.grad((expected * direction).sum(), exact), strict=True):
            assert float((gradient.double() - right).norm() / right.norm().clamp(min=1.0)) < 3e-5


@REPEATABLE
@given(ROWS, st.sampled_from(HEADS))
def test_a_small_line_is_attended_as_its_mask_says(
    rows: list[tuple[int, list[int]]], heads: tuple[int, int, int]
) -> None:
    assert_as_dense(line_of(rows), heads)


@pytest.mark.parametrize("heads", HEADS)
def test_a_long_line_is_attended_as_its_mask_says(heads: tuple[int, int, int], threads: int) -> None:
    assert_as_dense(line_of(LONG), heads)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="instruction sets of another processor")
@pytest.mark.parametrize(("without", "quick"), [("-mno-avx512f", True), ("-mno-avx", False)])
def test_processors_that_know_less_attend_alike(without: str, quick: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """But it is not taken unasked where registers are narrow."""
    kernel = fused.open_kernel(without)
    monkeypatch.setattr(fused, "open_kernel", lambda: kernel)
    assert kernel.part() < 32
    assert fused.is_quick() == quick
    assert_as_dense(line_of(LONG), HEADS[0])


def test_an_image_is_attended_as_torch_does(threads: int) -> None:
    query, key, value = (one[0] for one in states(line_of([(613, [0])]), 3, 3, 32))
    found = fused.attend_fused(query, key, value, fused.blocks_of_image(613), SCALE)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=SCALE).transpose(0, 1)
    assert_close(found, expected, atol=2e-6, rtol=1e-5)
    direction = torch.randn(found.shape, generator=torch.Generator().manual_seed(0))
    gradients = (torch.autograd.grad((one * direction).sum(), (query, key, value)) for one in (found, expected))
    for own, right in zip(*gradients, strict=True):
        assert_close(own, right, atol=1e-5, rtol=1e-4)


def test_scores_of_any_size_give_shares() -> None:
    query = torch.tensor([3000.0, -3000.0, 0.0]).expand(32, 3).T[None].contiguous()
    key = torch.tensor([1.0, -1.0, 0.5]).expand(32, 3).T[None].contiguous()
    value = torch.tensor([1.0, 10.0, 100.0]).expand(32, 3).T[None].contiguous()
    found = fused.attend_fused(query, key, value, fused.blocks_of_image(3), 1.0)[:, 0, 0]
    assert_close(found, torch.tensor([1.0, 10.0, 37.0]))


def test_what_is_not_a_number_comes_out_as_none() -> None:
    query = torch.ones(1, 2, 32)
    query[0, 1, 3] = float("nan")
    found = fused.attend_fused(query, torch.ones(1, 2, 32), torch.ones(1, 2, 32), fused.blocks_of_image(2), 1.0)
    assert found.isfinite().all(dim=-1).flatten().tolist() == [True, False]


def test_narrower_numbers_are_attended_in_float32() -> None:
    line = line_of(LONG)
    given = [one.detach().bfloat16() for one in states(line, *HEADS[0])]
    found = FusedAttention(line, CPU)(*given, SCALE)
    assert found.dtype == torch.bfloat16
    assert_close(found, FusedAttention(line, CPU)(*(one.float() for one in given), SCALE).bfloat16())


@pytest.mark.parametrize(("dtype", "as_vllm"), [(torch.float32, False), (torch.bfloat16, True), (torch.float16, True)])
def test_half_precision_alone_rounds_as_vllms_kernel(
    dtype: torch.dtype, as_vllm: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32 backward has the very shares of forward. That vLLM's bits come out: contracts/test_rounding.py."""
    given, inputs = [], fused._inputs
    monkeypatch.setattr(fused, "_inputs", lambda *own: given.append(own[-1]) or inputs(*own))
    state = torch.ones(1, 2, 32, dtype=dtype)
    fused.attend_fused(state, state, state, fused.blocks_of_image(2), 1.0)
    assert given == [as_vllm]


def test_gradients_in_half_precision_are_those_of_its_numbers() -> None:
    """Forward has another exponential there than backward; both must mean the same shares."""
    line = line_of(LONG)
    given = [one.detach().bfloat16().requires_grad_() for one in states(line, *HEADS[0])]
    exact = [one.detach().double().requires_grad_() for one in given]
    found, expected = FusedAttention(line, CPU)(*given, SCALE), DenseAttention(line, CPU)(*exact, SCALE)
    assert_close(found.double(), expected, atol=1e-6, rtol=2**-8)
    direction = torch.randn(found.shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    gradients = torch.autograd.grad((found * direction).sum(), given)
    for gradient, right in zip(gradients, torch.autograd.grad((expected * direction).sum(), exact), strict=True):
        assert float((gradient.double() - right).norm() / right.norm()) < 2**-8


def test_what_is_not_a_number_in_half_precision_comes_out_as_none() -> None:
    query = torch.ones(1, 2, 32, dtype=torch.bfloat16)
    query[0, 1, 3] = float("nan")
    seen = torch.ones_like(query)
    found = fused.attend_fused(query, seen, seen, fused.blocks_of_image(2), 1.0)
    assert found.isfinite().all(dim=-1).flatten().tolist() == [True, False]


@pytest.mark.parametrize(("width", "known"), [(32, True), (80, False), (128, True), (256, True), (512, False)])
def test_it_knows_which_heads_suit_it(width: int, known: bool) -> None:
    assert fused.suits(torch.empty(1, 1, 1, width)) == known


@pytest.mark.parametrize("width", [257, 288])
def test_heads_that_are_too_wide_are_refused(width: int) -> None:
    state = torch.zeros(1, 2, width)
    with pytest.raises(ValueError, match=rf"{width} numbers are too wide .* learner\.attention=grouped"):
        fused.attend_fused(state, state, state, fused.blocks_of_image(2), 1.0)


@pytest.mark.parametrize("width", [250, 256])
def test_the_widest_heads_are_attended(width: int) -> None:
    assert_as_dense(line_of([(5, [2, 3]), (2, [4])]), (2, 1, width))


def test_states_and_gradients_may_lie_in_memory_as_they_like() -> None:
    line = line_of([(5, [2, 3]), (2, [4])])
    plain = states(line, *HEADS[0])
    turned = [one.detach().mT.contiguous().mT.requires_grad_() for one in plain]
    assert {one.stride(-1) for one in turned} == {len(line)}
    direction = torch.randn(1, HEADS[0][0], len(line), HEADS[0][2], generator=torch.Generator().manual_seed(0))
    found: list[Tensor] = []
    expected: list[Tensor] = []
    for attention, inputs, got in ((FusedAttention, turned, found), (DenseAttention, plain, expected)):
        out = attention(line, CPU)(*inputs, SCALE)
        got += [out, *torch.autograd.grad((out.transpose(1, 2) * direction).sum(), inputs)]
    assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_what_is_chosen_stays_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "_CHOSEN", Event())
    assert fused.is_chosen() is False
    fused.choose()
    assert fused.is_chosen() is True


def test_where_no_compiler_is_the_remedy_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    said = r"g\+\+ made no kernel of fused\.cpp: .*; install g\+\+ 9 or newer, or set learner.attention=grouped"
    with pytest.raises(RuntimeError, match=said):
        fused.open_kernel("-g0")
    monkeypatch.setattr(fused, "open_kernel", partial(fused.open_kernel, "-g0"))
    with pytest.warns(UserWarning, match=said):
        assert not fused.is_quick()
    monkeypatch.setattr(fused, "_CHOSEN", Event())
    with pytest.raises(RuntimeError, match=said):
        fused.choose()
    assert not fused.is_chosen()


def test_what_the_compiler_says_is_told() -> None:
    with pytest.raises(RuntimeError, match=r"no kernel of fused\.cpp: g\+\+: .*-mno-such-processor.*; install g\+\+ 9"):
        fused.open_kernel("-mno-such-processor")
