"""DeepSpeed configuration of a learner: its ZeRO stage, float32 gradient sums, and one rounding per linear layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from othink_ray.config.schema import LearnerConfig

# Gradient elements per all-reduce: 200 MB in float32, enough for full bandwidth between GPUs. DeepSpeed's default of
# 5e8 would hold 2 GB on each GPU.
REDUCE_BUCKET = 50_000_000


def zero_settings(learner: LearnerConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Return the DeepSpeed configuration for a network of `dtype`.

    Without `data_types` and `communication_data_type`, a bfloat16 network's gradients would be summed in bfloat16 over
    micro-batches and ranks: each addition rounds to 8 bits. With them, stage 1 selects DeepSpeed's BF16_Optimizer,
    which without `immediate_grad_update` holds every bfloat16 gradient until the end of backward.
    """
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": learner.zero_stage, "reduce_bucket_size": REDUCE_BUCKET},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": dtype == torch.bfloat16, "immediate_grad_update": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "gradient_clipping": learner.max_grad_norm,
        "steps_per_print": 10**9,
    }


def flattened_linear(linear: Callable[[Tensor, Tensor, Tensor | None], Tensor]) -> Callable[..., Tensor]:
    """Wrap DeepSpeed's ZeRO-3 `linear` so that it adds the bias before it rounds, as other stages and the engines do.

    On input (batch, tokens, width) it rounds the product to bfloat16 and then the sum once more; on (tokens, width) it
    rounds once. DeepSpeed's switch `memory_efficient_linear: false` would also round once, but torch's linear keeps
    the gathered weight from forward to backward: without gradient checkpointing, all weights at once.
    """

    def flattened(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if bias is None or input.dim() < 3:
            return linear(input, weight, bias)
        output: Tensor = linear(input.flatten(0, -2), weight, bias).unflatten(0, input.shape[:-1])
        return output

    return flattened
