"""vLLM's C++ kernels for norms and for rotary embeddings of several axes, on CPUs.

Its CPU platform leaves these to a compiler, and without one runs a norm as seven operations of torch and a rotation as
25. The kernels are for float32: in half precision `vllm_rounding.py` says where numbers are rounded.

Import this in every process of vLLM before its network is built.
"""

from __future__ import annotations

from functools import partial, wraps
from typing import Any

import torch
import vllm.kernels  # noqa: F401  # registers vLLM's own implementations of the operations below
from torch import Tensor
from transformers.vision_utils import get_vision_interpolation_indices_and_weights
from vllm import _custom_ops, ir
from vllm.model_executor.layers import utils
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbeddingBase
from vllm.model_executor.layers.rotary_embedding.common import ApplyRotaryEmb
from vllm.model_executor.layers.rotary_embedding.mrope import MRotaryEmbedding
from vllm.model_executor.models.qwen3_vl import (
    Qwen3VLDecoderLayer,
    Qwen3VLForConditionalGeneration,
)
from vllm.platforms import current_platform
from vllm.v1.attention.backends import cpu_attn

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


_AS_TRANSFORMERS = "as_transformers"


def rounding_arguments() -> dict[str, Any]:
    """Arguments of `EngineArgs` for an engine in half precision."""
    return {
        # float32 logits, as the learner's. The text model of some families is built from the nested configuration.
        "hf_overrides": {"head_dtype": "float32", "text_config": {"head_dtype": "float32"}},
        "ir_op_priority": {"fused_add_rms_norm": [_AS_TRANSFORMERS]},
        "compilation_config": {
            # vLLM's own kernel rounds rotated queries and keys once; transformers rounds each product.
            "custom_ops": ["-rotary_embedding"],
            # Fused kernels keep float32 between operations, unless told to round as single operations do.
            "inductor_compile_config": {"emulate_precision_casts": True},
        },
        # Pixels are normalized by the processor in float32: on the device other values lie on the edge of a rounding.
        "mm_device_do_normalize": False,
    }


@ir.ops.fused_add_rms_norm.register_impl(_AS_TRANSFORMERS)  # type: ignore[untyped-decorator]
def _add_rms_norm(
    x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """Normalize the residual sum as it is stored; vLLM's own version normalizes it before it is rounded."""
    total = x + x_residual
    return ir.ops.rms_norm(total, weight, epsilon, variance_size), total


if current_platform.is_cpu():
    # On processors with AMX vLLM would round attention's shares to bfloat16, and multiply small matrices by kernels of
    # its own. The vector kernel and oneDNN do on all processors what the learner's attention and torch's products do.
    _choose_kernel = cpu_attn._get_attn_isa

    def _choose_vector_kernel(*shape: Any) -> str:
        kernel: str = _choose_kernel(*shape)
        return "vec" if kernel == "amx" else kernel

    cpu_attn._get_attn_isa = _choose_vector_kernel
    utils.check_cpu_sgl_kernel = lambda n, k, dtype: False


_initialize_rotary = ApplyRotaryEmb.__init__


def _initialize_in_float32(
    self: Any, enforce_enable: bool = False, is_neox_style: bool = True, enable_fp32_compute: bool = False
) -> None:
    """Rotate vision queries and keys (the only ones built with `enforce_enable`) in float32, and round once."""
    _initialize_rotary(self, enforce_enable, is_neox_style, enable_fp32_compute or enforce_enable)


def _float32_cos_sin(self: Any, seqlen: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines (seqlen, D / 2) of a vision tower's positions; vLLM's table is in the network's precision."""
    positions = torch.arange(seqlen, dtype=torch.float32, device=self.cos_sin_cache.device)
    angles = torch.outer(positions, self._compute_inv_freq(self.base).to(positions.device))
    return angles.cos(), angles.sin()


ApplyRotaryEmb.__init__ = _initialize_in_float32
RotaryEmbeddingBase.get_cos_sin = _float32_cos_sin


_build_qwen3_vl = Qwen3VLForConditionalGeneration.__init__


@wraps(_build_qwen3_vl)
def _build_as_transformers(self: Any, **settings: Any) -> None:
    _build_qwen3_vl(self, **settings)
    self.visual.fast_pos_embed_interpolate = partial(_interpolated, self.visual)
    for layer in self.language_model.model.layers[: self.deepstack_num_level]:
        layer.__class__ = _DeepStackLayer


def _interpolated(tower: Any, grids: Any) -> Tensor:
    """Positions (patches, H) between the learned ones; vLLM weights and sums them in the network's precision."""
    indices, weights = get_vision_interpolation_indices_and_weights(
        torch.as_tensor(grids, device=tower.device),
        tower.num_grid_per_side,
        align_corners=True,
        spatial_merge_size=tower.spatial_merge_size,
    )
    interpolated: Tensor = (tower.pos_embed(indices) * weights[..., None]).sum(1).to(tower.dtype)
    return interpolated


class _DeepStackLayer(Qwen3VLDecoderLayer):  # type: ignore[misc]  # vLLM is untyped here
    """A layer whose sum is stored before image features are added to it, not after."""

    def forward(self, *states: Any) -> tuple[Tensor, Tensor]:
        added, residual = super().forward(*states)
        return torch.zeros_like(added), residual + added


Qwen3VLForConditionalGeneration.__init__ = _build_as_transformers
