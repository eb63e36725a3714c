"""The fused CPU kernel against dense attention, on every instruction set of this processor."""

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

from othink_ray.core.attention import DenseAttention, FusedAttention
from othink_ray.core.packed_sequence import PackedSequence
from othink_ray.cpu import kernels
from tests.core.test_packed_sequence import CPU, REPEATABLE, SAMPLES, needed, sequence_of

SCALE = 0.4
LONG = [(100, [63] * 8), (37, [20, 1]), (300, [4])]
HEADS = ((6, 2, 32), (3, 3, 64), (7, 1, 128), (4, 2, 20))  # query heads, key heads, head dimension


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def states(sequence: PackedSequence, heads: int, key_heads: int, width: int) -> list[Tensor]:
    """Return query, key and value with the memory layout of a network: token by token."""
    rng = torch.Generator().manual_seed(len(sequence))
    return [
        torch.randn(1, len(sequence), count, width, generator=rng).transpose(1, 2).requires_grad_()
        for count in (heads, key_heads, key_heads)
    ]


def assert_as_dense(sequence: PackedSequence, heads: tuple[int, int, int]) -> None:
    """Compare with dense attention, in all layers and in the last, forward and backward, up to float32 rounding."""
    kernel, dense = FusedAttention(sequence, CPU), DenseAttention(sequence, CPU)
    kept = needed(sequence)[None, :, None, None]
    for attend, wanted in ((kernel, torch.ones_like(kept)), (kernel.in_last_layer, kept)):
        given = states(sequence, *heads)
        exact = [tensor.detach().double().requires_grad_() for tensor in given]
        found, expected = attend(*given, SCALE) * wanted, dense(*exact, SCALE) * wanted
        direction = torch.randn(found.shape, generator=torch.Generator().manual_seed(0))
        assert_close(found.double(), expected, atol=2e-5, rtol=1e-5)
        gradients = torch.autograd.grad((found * direction).sum(), given)
        for gradient, right in zip(gradients, torch.autograd.grad((expected * direction).sum(), exact), strict=True):
            assert float((gradient.double() - right).norm() / right.norm().clamp(min=1.0)) < 3e-5


@REPEATABLE
@given(SAMPLES, st.sampled_from(HEADS))
def test_small_sequences_equal_dense_attention(
    samples: list[tuple[int, list[int]]], heads: tuple[int, int, int]
) -> None:
    assert_as_dense(sequence_of(samples), heads)


@pytest.mark.parametrize("heads", HEADS)
def test_long_sequences_equal_dense_attention(heads: tuple[int, int, int], threads: int) -> None:
    assert_as_dense(sequence_of(LONG), heads)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="needs an x86-64 processor")
@pytest.mark.parametrize(("without", "fast"), [("-mno-avx512f", True), ("-mno-avx", False)])
def test_narrower_instruction_sets_give_the_same_result(
    without: str, fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel still works there, but is not chosen automatically where registers are narrow."""
    kernel = kernels.attention_kernel(without)
    monkeypatch.setattr(kernels, "attention_kernel", lambda: kernel)
    assert kernel.part() < 32
    assert kernels.attention_is_faster() == fast
    assert_as_dense(sequence_of(LONG), HEADS[0])


def test_image_attention_equals_torchs(threads: int) -> None:
    query, key, value = (tensor[0] for tensor in states(sequence_of([(613, [0])]), 3, 3, 32))
    found = kernels.fused_attention(query, key, value, kernels.image_block(613), SCALE)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=SCALE).transpose(0, 1)
    assert_close(found, expected, atol=2e-6, rtol=1e-5)
    direction = torch.randn(found.shape, generator=torch.Generator().manual_seed(0))
    gradients = (torch.autograd.grad((one * direction).sum(), (query, key, value)) for one in (found, expected))
    for gradient, right in zip(*gradients, strict=True):
        assert_close(gradient, right, atol=1e-5, rtol=1e-4)


def test_extreme_scores_give_finite_probabilities() -> None:
    query = torch.tensor([3000.0, -3000.0, 0.0]).expand(32, 3).T[None].contiguous()
    key = torch.tensor([1.0, -1.0, 0.5]).expand(32, 3).T[None].contiguous()
    value = torch.tensor([1.0, 10.0, 100.0]).expand(32, 3).T[None].contiguous()
    found = kernels.fused_attention(query, key, value, kernels.image_block(3), 1.0)[:, 0, 0]
    assert_close(found, torch.tensor([1.0, 10.0, 37.0]))


def test_nan_inputs_give_nan_outputs() -> None:
    query = torch.ones(1, 2, 32)
    query[0, 1, 3] = float("nan")
    found = kernels.fused_attention(query, torch.ones(1, 2, 32), torch.ones(1, 2, 32), kernels.image_block(2), 1.0)
    assert found.isfinite().all(dim=-1).flatten().tolist() == [True, False]


def test_half_precision_is_computed_in_float32() -> None:
    sequence = sequence_of(LONG)
    given = [tensor.detach().bfloat16() for tensor in states(sequence, *HEADS[0])]
    found = FusedAttention(sequence, CPU)(*given, SCALE)
    assert found.dtype == torch.bfloat16
    assert_close(found, FusedAttention(sequence, CPU)(*(tensor.float() for tensor in given), SCALE).bfloat16())


@pytest.mark.parametrize(("dtype", "as_vllm"), [(torch.float32, False), (torch.bfloat16, True), (torch.float16, True)])
def test_only_half_precision_rounds_like_vllms_kernel(
    dtype: torch.dtype, as_vllm: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32, backward must recompute exactly the probabilities of forward.

    contracts/test_rounding.py checks that half-precision outputs equal vLLM's.
    """
    given, inputs = [], kernels._inputs
    monkeypatch.setattr(kernels, "_inputs", lambda *args: given.append(args[-1]) or inputs(*args))
    state = torch.ones(1, 2, 32, dtype=dtype)
    kernels.fused_attention(state, state, state, kernels.image_block(2), 1.0)
    assert given == [as_vllm]


def test_half_precision_gradients_equal_exact_ones() -> None:
    """Forward and backward use different exponentials there; both must give the same probabilities."""
    sequence = sequence_of(LONG)
    given = [tensor.detach().bfloat16().requires_grad_() for tensor in states(sequence, *HEADS[0])]
    exact = [tensor.detach().double().requires_grad_() for tensor in given]
    found, expected = FusedAttention(sequence, CPU)(*given, SCALE), DenseAttention(sequence, CPU)(*exact, SCALE)
    assert_close(found.double(), expected, atol=1e-6, rtol=2**-8)
    direction = torch.randn(found.shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    gradients = torch.autograd.grad((found * direction).sum(), given)
    for gradient, right in zip(gradients, torch.autograd.grad((expected * direction).sum(), exact), strict=True):
        assert float((gradient.double() - right).norm() / right.norm()) < 2**-8


def test_half_precision_nan_inputs_give_nan_outputs() -> None:
    query = torch.ones(1, 2, 32, dtype=torch.bfloat16)
    query[0, 1, 3] = float("nan")
    seen = torch.ones_like(query)
    found = kernels.fused_attention(query, seen, seen, kernels.image_block(2), 1.0)
    assert found.isfinite().all(dim=-1).flatten().tolist() == [True, False]


@pytest.mark.parametrize(("width", "supported"), [(32, True), (80, False), (128, True), (256, True), (512, False)])
def test_supported_head_dimensions_are_reported(width: int, supported: bool) -> None:
    assert kernels.supports_head_dim(torch.empty(1, 1, 1, width)) == supported


@pytest.mark.parametrize("width", [257, 288])
def test_too_large_head_dimensions_are_rejected(width: int) -> None:
    state = torch.zeros(1, 2, width)
    with pytest.raises(ValueError, match=rf"head dimension {width} must be at most .* learner\.attention=grouped"):
        kernels.fused_attention(state, state, state, kernels.image_block(2), 1.0)


@pytest.mark.parametrize("width", [250, 256])
def test_the_largest_head_dimensions_are_supported(width: int) -> None:
    assert_as_dense(sequence_of([(5, [2, 3]), (2, [4])]), (2, 1, width))


def test_any_memory_layout_of_states_and_gradients_works() -> None:
    sequence = sequence_of([(5, [2, 3]), (2, [4])])
    plain = states(sequence, *HEADS[0])
    turned = [tensor.detach().mT.contiguous().mT.requires_grad_() for tensor in plain]
    assert {tensor.stride(-1) for tensor in turned} == {len(sequence)}
    direction = torch.randn(1, HEADS[0][0], len(sequence), HEADS[0][2], generator=torch.Generator().manual_seed(0))
    found: list[Tensor] = []
    expected: list[Tensor] = []
    for attention, inputs, got in ((FusedAttention, turned, found), (DenseAttention, plain, expected)):
        out = attention(sequence, CPU)(*inputs, SCALE)
        got += [out, *torch.autograd.grad((out.transpose(1, 2) * direction).sum(), inputs)]
    assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_choosing_the_kernel_is_permanent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_IMAGES", Event())
    assert kernels.enabled_for_images() is False
    kernels.enable_for_images()
    assert kernels.enabled_for_images() is True


def test_without_a_compiler_the_error_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    message = r"g\+\+ could not compile attention\.cpp: .*; install g\+\+ 9 or newer, or set learner.attention=grouped"
    with pytest.raises(RuntimeError, match=message):
        kernels.attention_kernel("-g0")
    monkeypatch.setattr(kernels, "attention_kernel", partial(kernels.attention_kernel, "-g0"))
    with pytest.warns(UserWarning, match=message):
        assert not kernels.attention_is_faster()
    monkeypatch.setattr(kernels, "_IMAGES", Event())
    with pytest.raises(RuntimeError, match=message):
        kernels.enable_for_images()
    assert not kernels.enabled_for_images()


def test_the_error_contains_the_compilers_message() -> None:
    with pytest.raises(
        RuntimeError, match=r"could not compile attention\.cpp: g\+\+: .*-mno-such-processor.*; install g\+\+ 9"
    ):
        kernels.attention_kernel("-mno-such-processor")
