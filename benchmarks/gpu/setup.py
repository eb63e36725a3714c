"""What the parts of the check are run with."""

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
    """One machine and the work that it is given; the defaults are the check's own."""

    folder: Path  # for models and what a part leaves
    device: torch.device = field(default_factory=lambda: torch.device("cuda", 0))
    dtype: str = "bfloat16"
    name: str = "qwen2_vl_2b"  # of the model
    shapes: Mapping[str, Shape] = field(default_factory=lambda: SHAPES)
    sides: tuple[int, ...] = (448, 1024)  # of images, in pixels
    tokens: tuple[int, ...] = (256, 1024)  # of each answer
    answers: int = 8
    asked: int = 16  # prompts of one generation
    learned: int = 2  # groups of one learner step
    steps: int = 3  # that are timed, after one that is not
    colocated_steps: int = 20
    yardstick: int = 8192  # side of the matrices that measure a peak
    # What is wanted: a row that has less than that is failed.
    gap: float = 0.05  # nats between engine and learner after a push, on average; bfloat16 rounds that much
    push_s: float = 1.0  # of a push by IPC, at the median
    grown_gb: float = 0.2  # of memory in use, from an early step to the last one
    times_padded: float = 3.0  # as fast as padded rows
    # What the engine is set to, beside conf/rollout.
    engine: Mapping[str, Any] = field(default_factory=lambda: {"gpus_per_actor": 1, "max_model_len": 3072})

    def model(self) -> ModelConfig:
        return write_model(self.shapes[self.name], self.folder / self.name, self.device, self.dtype)

    @cached_property
    def device_name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"

    @cached_property
    def peak(self) -> float:
        """Operations a second: the maker's figure, else a measured one."""
        return peak(self.device_name) or measured_peak(self.device, self.yardstick)
