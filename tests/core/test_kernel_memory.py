"""The stand-in for fused attention kernels has their shapes, and saves for backward what they save."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from othink_ray.core.attention import KernelShape, kernel_shape

HEADS, KEY_HEADS, TOKENS, WIDTH = 6, 2, 11, 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_saves_inputs_output_and_float32_log_sums(dtype: torch.dtype) -> None:
    """Kernels keep log-sum-exp in float32 for any input dtype; with bfloat16 the memory plan would be too low."""
    query, key, value = (
        torch.empty(3, heads, TOKENS, WIDTH, dtype=dtype, device="meta", requires_grad=True)
        for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    )
    saved: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = kernel_shape(query, key, value)
    assert out.shape == KernelShape()(query, key, value, None).shape == (3, TOKENS, HEADS, WIDTH)
    assert [(tensor.shape, tensor.dtype) for tensor in saved] == [
        ((3, HEADS, TOKENS, WIDTH), dtype),
        ((3, KEY_HEADS, TOKENS, WIDTH), dtype),
        ((3, KEY_HEADS, TOKENS, WIDTH), dtype),
        ((3, HEADS, TOKENS, WIDTH), dtype),
        ((3, HEADS, TOKENS), torch.float32),
    ]
    out.backward(torch.empty_like(out))
    assert [tensor.grad.shape for tensor in (query, key, value) if tensor.grad is not None] == [
        tensor.shape for tensor in (query, key, value)
    ]
