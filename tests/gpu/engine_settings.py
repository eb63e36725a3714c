"""Resolve vLLM's configuration as on a node of H200 GPUs, on a machine without GPUs; print it as JSON.

    python -m tests.gpu.engine_settings MODEL_FOLDER < settings.json

`settings.json` is a list of Hydra overrides per engine. Runs as a separate program: a process has one vLLM platform.
"""

from __future__ import annotations

import json
import sys
import types
from typing import Any
from unittest import mock


def pretend_cuda() -> None:
    """Fake a Hopper platform before vLLM detects one: modules missing from the CPU build exist, but are empty."""
    for name in ("_C_stable_libtorch", "_C", "_moe_C", "_moe_C_stable_libtorch"):
        sys.modules[f"vllm.{name}"] = types.ModuleType(f"vllm.{name}")
    import vllm

    assert vllm.__version__
    sys.modules["vllm.vllm_flash_attn"] = mock.MagicMock(__spec__=None, __path__=[])
    import vllm._custom_ops as operations
    from vllm import platforms
    from vllm.platforms.cuda import CudaPlatformBase
    from vllm.platforms.interface import DeviceCapability

    for name in dir(operations):
        if "supports" in name or "supported" in name:
            setattr(operations, name, lambda *_inputs, **_named: True)

    class Hopper(CudaPlatformBase):  # type: ignore[misc]
        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> Any:
            return DeviceCapability(9, 0)

        @classmethod
        def has_device_capability(cls, capability: Any, device_id: int = 0) -> bool:
            requested = capability if isinstance(capability, int) else capability[0] * 10 + capability[1]
            return bool(requested <= 90)

        @classmethod
        def get_device_name(cls, device_id: int = 0) -> str:
            return "NVIDIA H200"

        @classmethod
        def get_device_total_memory(cls, device_id: int = 0) -> int:
            return 141 * 2**30

        @classmethod
        def device_count(cls) -> int:
            return 8

        @classmethod
        def is_fully_connected(cls, ids: Any) -> bool:
            return True

        @classmethod
        def log_warnings(cls) -> None: ...

        def is_sleep_mode_available(self) -> bool:
            return True

        def is_cumem_allocator_available(self) -> bool:
            return True

    platforms._current_platform = Hopper()
    import vllm.config.vllm as configuration

    configuration.HAS_TRITON = True


def resolved(path: str, overrides: list[str]) -> dict[str, Any]:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.usage.usage_lib import UsageContext

    from othink_ray.config.load import load
    from othink_ray.config.rules import transport_of
    from othink_ray.engines.vllm_rollout import VLLMRollout

    config = load(overrides)
    family = types.SimpleNamespace(
        processor_settings={"min_pixels": config.model.min_pixels, "max_pixels": config.model.max_pixels}
    )
    transport = transport_of(config)
    arguments = VLLMRollout.arguments(
        config.rollout,
        config.model,
        family,
        path,
        transport=transport,
        max_logprobs=8,  # type: ignore[arg-type]
    )
    found = EngineArgs(**arguments).create_engine_config(UsageContext.LLM_CLASS)
    model, parallel, scheduler = found.model_config, found.parallel_config, found.scheduler_config
    return {
        "runner 2": found.use_v2_model_runner,
        "worker": parallel.worker_cls,
        "extension": parallel.worker_extension_cls,
        "processes": parallel.tensor_parallel_size,
        "executor": parallel.distributed_executor_backend,
        "dtype": str(model.dtype),
        "logprobs": str(model.logprobs_mode),
        "tower": str(model.multimodal_config.mm_encoder_tp_mode),
        "sleeps": model.enable_sleep_mode,
        "eager": model.enforce_eager,
        "graphs": found.compilation_config.cudagraph_mode.name,
        "largest graph": found.compilation_config.max_cudagraph_capture_size,
        "async": scheduler.async_scheduling,
        "chunked": scheduler.enable_chunked_prefill,
        "length": model.max_model_len,
        "side by side": scheduler.max_num_seqs,
        "memory": found.cache_config.gpu_memory_utilization,
        "prefix caching": found.cache_config.enable_prefix_caching,
        "transfer": found.weight_transfer_config and found.weight_transfer_config.backend,
    }


def main(path: str) -> None:
    pretend_cuda()
    from othink_ray.engines.vllm_rollout import _inspect_here

    _inspect_here(path)
    for overrides in json.load(sys.stdin):
        print("RESOLVED " + json.dumps(resolved(path, overrides)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
