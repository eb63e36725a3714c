"""DeepSpeed's configuration of a learner: its ZeRO stage, float32 sums of gradients, and one rounding a product."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from othink_ray.config.schema import LearnerConfig

# Elements of gradients that ranks exchange at a time: 200 MB in float32, enough for a full rate between GPUs, where
# DeepSpeed's 5e8 would hold 2 GB on each of them.
REDUCE_BUCKET = 50_000_000


def zero_settings(learner: LearnerConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The configuration for a network of `dtype`.

    Without `data_types` and `communication_data_type` a bfloat16 network's gradients would be added in bfloat16, over
    micro-batches and over ranks: each addition rounds to 8 bits. With them stage 1 is another class of DeepSpeed's,
    BF16_Optimizer, which keeps a parameter's bfloat16 gradient until the end of backward unless it is added at once.
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


def linear_over_rows(linear: Callable[[Tensor, Tensor, Tensor | None], Tensor]) -> Callable[..., Tensor]:
    """DeepSpeed's `linear` of ZeRO 3, which adds the bias before it rounds, as other stages and the engines do.

    Of (batch, tokens, width) it would round the product to bfloat16 first and the sum once more; of (rows, width) it
    does not. Its own switch, `memory_efficient_linear: false`, would round once too, but torch's linear layer keeps
    the gathered weight from its forward to its backward pass: without gradient checkpointing, all of them at once.
    """

    def over_rows(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if bias is None or input.dim() < 3:
            return linear(input, weight, bias)
        whole: Tensor = linear(input.flatten(0, -2), weight, bias).unflatten(0, input.shape[:-1])
        return whole

    return over_rows
