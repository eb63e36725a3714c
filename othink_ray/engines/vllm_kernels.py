"""vLLM's C++ kernels for norms and for rotary embeddings of several axes, on CPUs.

Its CPU platform leaves these to a compiler, and without one runs a norm as seven operations of torch and a rotation as
25. The kernels are for float32: in half precision `vllm_rounding.py` says where numbers are rounded.

Import this in every process of vLLM before its network is built.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm import _custom_ops, ir
from vllm.model_executor.layers.rotary_embedding.mrope import MRotaryEmbedding
from vllm.platforms import current_platform

_KERNEL = "cpu_kernel"
_LANES = 16  # numbers that a kernel handles at a time; it takes no other number of them


def kernel_arguments() -> dict[str, Any]:
    """Arguments of `EngineArgs` for an engine on CPUs, in float32, that compiles nothing."""
    return {"ir_op_priority": {name: [_KERNEL, "native"] for name in ("rms_norm", "fused_add_rms_norm")}}


def _suits(x: Tensor, weight: Tensor | None, variance_size: int | None) -> bool:
    alike = weight is None or weight.dtype == torch.float32
    return x.dtype == torch.float32 and alike and variance_size is None and x.shape[-1] % _LANES == 0


@ir.ops.rms_norm.register_impl(  # type: ignore[untyped-decorator]
    _KERNEL,
    supported=current_platform.is_cpu(),
    supports_args=lambda x, weight, epsilon, variance_size=None: _suits(x, weight, variance_size),
)
def _rms_norm_kernel(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> Tensor:
    normalized = torch.empty(x.shape, dtype=x.dtype)
    _custom_ops.rms_norm(normalized, x.contiguous(), weight, epsilon)
    return normalized


@ir.ops.fused_add_rms_norm.register_impl(  # type: ignore[untyped-decorator]
    _KERNEL,
    supported=current_platform.is_cpu(),
    supports_args=lambda x, x_residual, weight, epsilon, variance_size=None: (
        _suits(x, weight, variance_size) and x.is_contiguous() and x_residual.is_contiguous()
    ),
    inplace=True,
)
def _add_rms_norm_kernel(
    x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> tuple[Tensor, Tensor]:
    _custom_ops.fused_add_rms_norm(x, x_residual, weight, epsilon)
    return x, x_residual


def _rotate(
    self: Any, positions: Tensor, query: Tensor, key: Tensor, offsets: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Rotate query and key (tokens, heads * D) in place by positions (axes, tokens), of which each angle has its own.

    The kernel knows one axis. It is given a table of its own for these tokens: the cosines and sines of each.
    """
    if query.dtype != torch.float32 or positions.ndim == 1 or (self.rotary_dim // 2) % _LANES:
        rotated: tuple[Tensor, Tensor] = self.forward_native(positions, query, key, offsets)
        return rotated
    table = self._match_cos_sin_cache_dtype(query).gather(0, positions[_axes(self)].T)
    tokens = torch.arange(positions.shape[1])
    _custom_ops.rotary_embedding(tokens, query, key, self.head_size, table, self.is_neox_style)
    return query, key


def _axes(rotary: Any) -> Tensor:
    """Which axis each column of vLLM's table of cosines and sines turns by."""
    if not hasattr(rotary, "_axis_of_column"):
        section = rotary.mrope_section
        if rotary.mrope_interleaved:
            half = torch.arange(rotary.rotary_dim // 2)
            axis = half % 3
            axis[half >= 3 * torch.tensor(section)[axis]] = 0
        else:
            axis = torch.arange(len(section)).repeat_interleave(torch.tensor(section))
        rotary._axis_of_column = axis.repeat(2)
    axes: Tensor = rotary._axis_of_column
    return axes


if current_platform.is_cpu():
    MRotaryEmbedding.forward_cpu = _rotate
