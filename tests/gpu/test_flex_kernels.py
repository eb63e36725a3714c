"""The learner's FlexAttention, compiled for Hopper at the heads of public models, without a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.flex_kernels import SHARED_BYTES
from tests.gpu.public_models import PUBLIC

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("direction", "model"), [("forward", "qwen2_5_vl_3b"), ("backward", "qwen2_vl_2b"), ("backward", "qwen2_vl_7b")]
)
def test_flex_attention_compiles_for_hopper(direction: str, model: str) -> None:
    """Forward compiles once for all packed sequences of 128 tokens or more, and once for shorter ones."""
    text = PUBLIC[model].text_config
    assert text.hidden_size == 128 * text.num_attention_heads
    kernels = compiled(direction, "sequence", text.num_attention_heads, text.num_key_value_heads)
    assert len(kernels) == (2 if direction == "forward" else 1)
    for kernel in kernels:
        assert_fits(kernel)


@pytest.mark.parametrize(
    ("direction", "width"), [("forward", 80), ("backward", 80), ("backward", 72), ("backward", 64)]
)
def test_packed_images_compile_for_hopper(direction: str, width: int) -> None:
    """Forward compiles once for all patch counts above 128, once for 128 and once for fewer."""
    assert {width_of_heads(model) for model in PUBLIC if model.startswith("qwen")} == {64, 80}  # 72: Qwen3-VL-8B
    kernels = compiled(direction, "images", 16, width)
    assert len(kernels) == (3 if direction == "forward" else 1)
    for kernel in kernels:
        assert_fits(kernel)


def width_of_heads(model: str) -> int:
    tower = PUBLIC[model].vision_config
    assert tower.num_heads == 16
    width: int = getattr(tower, "embed_dim", tower.hidden_size) // 16
    return width


def compiled(direction: str, kind: str, *numbers: int) -> list[dict[str, Any]]:
    program = subprocess.run(
        [sys.executable, "-m", "tests.gpu.flex_kernels", direction, kind, *map(str, numbers)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=280,
        check=False,
    )
    kernels = [json.loads(line.partition(" ")[2]) for line in program.stdout.splitlines() if line.startswith("KERNEL ")]
    assert kernels, program.stderr[-3000:]
    return kernels


def assert_fits(kernel: dict[str, Any]) -> None:
    """Assert that a kernel uses tensor cores, and at most a block's 227 KiB of shared memory on Hopper."""
    assert kernel["tensor cores"]
    assert kernel["cubin"] > 100_000
    assert 0 < kernel["shared"] <= SHARED_BYTES == 227 * 1024
