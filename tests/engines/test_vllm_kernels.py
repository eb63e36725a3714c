"""On CPUs, vLLM's norms and rotations run its C++ kernels, with the results of its torch implementations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from othink_ray.config.schema import Config
from othink_ray.engines.base import Sampling
from othink_ray.engines.policy import Policy
from othink_ray.engines.vllm_rollout import VLLMRollout
from othink_ray.families.base import Family
from othink_ray.types import Prompt
from tests.engines.samples import give, sent_weights

CLOSE = 1e-6


@pytest.mark.parametrize("tokens", [1, 50])
@pytest.mark.parametrize(
    ("head", "section", "interleaved"),
    [
        (32, [4, 6, 6], False),
        (64, [8, 12, 12], False),
        (128, [16, 24, 24], False),  # Qwen2-VL and Qwen2.5-VL
        (128, [24, 20, 20], True),  # Qwen3-VL
        (64, [12, 10, 10], True),
        (48, [8, 8, 8], False),  # 24 angles, not a multiple of the kernel's SIMD width
    ],
)
def test_positions_of_several_axes_rotate_as_in_vllm(
    head: int, section: list[int], interleaved: bool, tokens: int, vllm_engine: VLLMRollout
) -> None:
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding.mrope import MRotaryEmbedding

    with set_current_vllm_config(vllm_engine.engine.vllm_config):
        rotary = MRotaryEmbedding(
            head, head, 512, 1e4, True, torch.float32, mrope_section=section, mrope_interleaved=interleaved
        )
    generator = torch.Generator().manual_seed(0)
    for dtype, tolerance in ((torch.float32, CLOSE), (torch.bfloat16, 0.0)):
        for axes in (3, 1):  # pure text may have positions of one axis
            positions = torch.randint(2048, (axes, tokens), generator=generator).squeeze(0)
            packed = torch.randn(tokens, 5 * head, generator=generator).to(dtype)
            query, key, _ = packed.split([3 * head, head, head], dim=-1)
            wanted = rotary.forward_native(positions, query.clone(), key.clone())
            for found, one in zip(rotary.forward_cpu(positions, query, key), wanted, strict=True):
                torch.testing.assert_close(found, one, rtol=0, atol=tolerance)


@pytest.mark.parametrize("shape", [(5, 128), (5, 3, 32), (0, 64), (4, 40)])
def test_norms_match_vllms_native_norms(shape: tuple[int, ...], vllm_engine: VLLMRollout) -> None:
    from vllm import ir

    from othink_ray.engines.vllm_patches import kernel_arguments

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape[:-1], 2 * shape[-1], generator=generator)[..., : shape[-1]]  # a slice of a wider tensor
    weight = torch.rand(shape[-1], generator=generator)
    chosen = kernel_arguments()["ir_op_priority"]
    norm, add_norm = ir.ops.rms_norm, ir.ops.fused_add_rms_norm
    wanted = norm.impls["native"].impl_fn(x, weight, 1e-6)
    with norm.set_priority(chosen["rms_norm"]):
        torch.testing.assert_close(norm(x, weight, 1e-6), wanted, rtol=0, atol=CLOSE)
    residual = torch.randn(shape, generator=generator)
    for added in (x, x.contiguous()):
        wanted = add_norm.impls["native"].impl_fn(added, residual, weight, 1e-6)
        with add_norm.set_priority(chosen["fused_add_rms_norm"]):
            found = add_norm.maybe_inplace(added.clone(), residual.clone(), weight, 1e-6)
        torch.testing.assert_close(found, wanted, rtol=0, atol=CLOSE)


def test_an_engine_runs_on_the_kernels(vllm_engine: VLLMRollout, policy: Policy, scenes: Sequence[Prompt]) -> None:
    give(vllm_engine, sent_weights(policy.network), 0)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        list(vllm_engine.generate(scenes[:1], Sampling(answers=1, max_tokens=2, temperature=1.0, seed=0)))
    calls = {event.key: event.count for event in seen.key_averages()}
    layers = policy.network.config.text_config.num_hidden_layers
    passes = calls["_C::rotary_embedding"] // layers
    assert passes >= 1
    assert calls["_C::rms_norm"] == passes
    assert calls["_C::fused_add_rms_norm"] == 2 * layers * passes
    assert "aten::rsqrt" not in calls


def test_half_precision_and_compiled_engines_keep_vllms_norms(config: Config, family: Family) -> None:
    eager = config.rollout
    compiled = replace(eager, enforce_eager=False)
    for rollout, dtype in ((eager, "bfloat16"), (compiled, "float32")):
        model = replace(config.model, dtype=dtype)
        arguments = VLLMRollout.arguments(rollout, model, family, "", transport="shared_memory", max_logprobs=20)
        assert "cpu_kernel" not in str(arguments)
