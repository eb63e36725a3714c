"""Settings of the check's parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.peaks import measured_peak, peak
from benchmarks.gpu.shapes import SHAPES, Shape, write_model
from othink_ray.config.schema import ModelConfig


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Device, workload and limits of a check; the defaults are those of launch/gpu_check.sh."""

    folder: Path  # for models and the parts' output files
    device: torch.device = field(default_factory=lambda: torch.device("cuda", 0))
    dtype: str = "bfloat16"
    name: str = "qwen2_vl_2b"  # of the model, a key of `shapes`
    shapes: Mapping[str, Shape] = field(default_factory=lambda: SHAPES)
    sides: tuple[int, ...] = (448, 1024)  # of square images, in pixels
    tokens: tuple[int, ...] = (256, 1024)  # per answer
    answers: int = 8
    prompts: int = 16  # per generation
    groups: int = 2  # per learner step
    steps: int = 3  # timed, after one warm-up step
    colocated_steps: int = 20
    matmul_side: int = 8192  # side of the matrices whose matmul measures the peak
    # Limits: a row that misses one is marked as failed.
    gap: float = 0.05  # mean nats between engine and learner after a push; rounding of bfloat16 stays below
    push_s: float = 1.0  # median of a push by IPC
    grown_gb: float = 0.2  # growth of the memory in use, from an early step to the last
    times_padded: float = 3.0  # minimum speedup over padded samples
    # Engine settings on top of conf/rollout.
    engine: Mapping[str, Any] = field(default_factory=lambda: {"gpus_per_actor": 1, "max_model_len": 3072})

    def model(self) -> ModelConfig:
        """Write the model's folder if needed, and return its config."""
        return write_model(self.shapes[self.name], self.folder / self.name, self.device, self.dtype)

    @cached_property
    def device_name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"

    @cached_property
    def peak(self) -> float:
        """Return the peak FLOP/s: the vendor's figure if known, else a measured one."""
        return peak(self.device_name) or measured_peak(self.device, self.matmul_side)
