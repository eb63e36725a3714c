"""Patches of vLLM: fast CPU kernels in float32, and in half precision the rounding of transformers.

In float32, vLLM's CPU platform leaves norms and multi-axis rotary embeddings to a compiler; without one it runs a norm
as 7 torch operations and a rotation as 25. The patches select vLLM's C++ kernels instead. In half precision they round
where transformers does, so that engine and learner compute the same logprobs.

Import this module in every vLLM process before its network is built.
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
_AS_TRANSFORMERS = "as_transformers"
_LANES = 16  # SIMD width of the kernels, in elements: they take multiples of it


def kernel_arguments() -> dict[str, Any]:
    """Return arguments of `EngineArgs` for a float32 engine on CPUs that compiles nothing."""
    return {"ir_op_priority": {name: [_KERNEL, "native"] for name in ("rms_norm", "fused_add_rms_norm")}}


def rounding_arguments() -> dict[str, Any]:
    """Return arguments of `EngineArgs` for an engine in half precision."""
    return {
        # float32 logits, as the learner's. The text model of some families is built from the nested configuration.
        "hf_overrides": {"head_dtype": "float32", "text_config": {"head_dtype": "float32"}},
        "ir_op_priority": {"fused_add_rms_norm": [_AS_TRANSFORMERS]},
        "compilation_config": {
            # vLLM's kernel rounds rotated queries and keys once; transformers rounds each product.
            "custom_ops": ["-rotary_embedding"],
            # Fused kernels keep float32 between operations, unless they emulate the rounding of single operations.
            "inductor_compile_config": {"emulate_precision_casts": True},
        },
        # The processor normalizes pixels in float32, as the learner's does; on the device some would round differently.
        "mm_device_do_normalize": False,
    }


def _supported(x: Tensor, weight: Tensor | None, variance_size: int | None) -> bool:
    float32_weight = weight is None or weight.dtype == torch.float32
    return x.dtype == torch.float32 and float32_weight and variance_size is None and x.shape[-1] % _LANES == 0


@ir.ops.rms_norm.register_impl(  # type: ignore[untyped-decorator]
    _KERNEL,
    supported=current_platform.is_cpu(),
    supports_args=lambda x, weight, epsilon, variance_size=None: _supported(x, weight, variance_size),
)
def _rms_norm_kernel(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> Tensor:
    normalized = torch.empty(x.shape, dtype=x.dtype)
    _custom_ops.rms_norm(normalized, x.contiguous(), weight, epsilon)
    return normalized


@ir.ops.fused_add_rms_norm.register_impl(  # type: ignore[untyped-decorator]
    _KERNEL,
    supported=current_platform.is_cpu(),
    supports_args=lambda x, x_residual, weight, epsilon, variance_size=None: (
        _supported(x, weight, variance_size) and x.is_contiguous() and x_residual.is_contiguous()
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
    """Rotate query and key (tokens, heads * D) in place by positions (axes, tokens); each angle belongs to one axis.

    vLLM's kernel takes one axis, so it gets a table of cosines and sines built for these tokens, indexed 0, 1, 2, ...
    """
    if query.dtype != torch.float32 or positions.ndim == 1 or (self.rotary_dim // 2) % _LANES:
        rotated: tuple[Tensor, Tensor] = self.forward_native(positions, query, key, offsets)
        return rotated
    table = self._match_cos_sin_cache_dtype(query).gather(0, positions[_axes(self)].T)
    tokens = torch.arange(positions.shape[1])
    _custom_ops.rotary_embedding(tokens, query, key, self.head_size, table, self.is_neox_style)
    return query, key


def _axes(rotary: Any) -> Tensor:
    """Return the position axis of each column of vLLM's table of cosines and sines, cached on the module."""
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


@ir.ops.fused_add_rms_norm.register_impl(_AS_TRANSFORMERS)  # type: ignore[untyped-decorator]
def _add_rms_norm(
    x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """Normalize the residual sum after rounding it for storage; vLLM's implementation normalizes the unrounded sum."""
    total = x + x_residual
    return ir.ops.rms_norm(total, weight, epsilon, variance_size), total


if current_platform.is_cpu():
    # On processors with AMX, vLLM would round attention weights to bfloat16 and multiply small matrices with special
    # kernels. Its vector kernel and oneDNN compute what the learner's attention and torch's matmul compute.
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
    """Rotate vision queries and keys (the only modules built with `enforce_enable`) in float32, and round once."""
    _initialize_rotary(self, enforce_enable, is_neox_style, enable_fp32_compute or enforce_enable)


def _float32_cos_sin(self: Any, seqlen: int) -> tuple[Tensor, Tensor]:
    """Return float32 cosines and sines (seqlen, D / 2) of a vision tower's positions; vLLM's are in model precision."""
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
    """Interpolate position embeddings to (patches, H) in float32; vLLM weights and sums them in model precision."""
    indices, weights = get_vision_interpolation_indices_and_weights(
        torch.as_tensor(grids, device=tower.device),
        tower.num_grid_per_side,
        align_corners=True,
        spatial_merge_size=tower.spatial_merge_size,
    )
    interpolated: Tensor = (tower.pos_embed(indices) * weights[..., None]).sum(1).to(tower.dtype)
    return interpolated


class _DeepStackLayer(Qwen3VLDecoderLayer):  # type: ignore[misc]  # vLLM is untyped here
    """A layer that rounds its residual sum before image features are added, not after."""

    def forward(self, *states: Any) -> tuple[Tensor, Tensor]:
        added, residual = super().forward(*states)
        return torch.zeros_like(added), residual + added


Qwen3VLForConditionalGeneration.__init__ = _build_as_transformers
