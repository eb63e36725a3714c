"""A stand-in for a fused attention kernel on the meta device: shapes and saved tensors, no values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from othink_ray.core.attention import Attention


class _Kernel(torch.autograd.Function):
    """Saves what flash attention, FlexAttention and this package's CPU kernel save: inputs, output, log-sum-exp."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query)
        log_sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, log_sums)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def kernel_shape(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """(B, heads, N, D) and twice (B, key heads, N, D) -> (B, N, heads, D), without values."""
    out: Tensor = _Kernel.apply(query, key, value)  # type: ignore[no-untyped-call]
    return out.transpose(1, 2)


class KernelShape(Attention):
    """The attention of a packed sequence of any length, for `kernel_shape`."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        return kernel_shape(query, key, value)
