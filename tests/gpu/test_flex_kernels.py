"""The learner's FlexAttention, compiled for Hopper at the heads of Qwen2-VL-2B and 7B, without a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu.flex_kernels import SHARED_BYTES
from tests.gpu.public_models import PUBLIC

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("direction", "model"), [("forward", "qwen2_vl_2b"), ("backward", "qwen2_vl_2b"), ("backward", "qwen2_vl_7b")]
)
def test_flex_attention_compiles_for_hopper(direction: str, model: str) -> None:
    """One kernel of tensor-core instructions, within the shared memory that a block can have there: 227 KiB."""
    text = PUBLIC[model].text_config
    assert text.hidden_size == 128 * text.num_attention_heads
    heads = [str(text.num_attention_heads), str(text.num_key_value_heads)]
    program = subprocess.run(
        [sys.executable, "-m", "tests.gpu.flex_kernels", direction, *heads],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=280,
        check=False,
    )
    kernels = [json.loads(line.partition(" ")[2]) for line in program.stdout.splitlines() if line.startswith("KERNEL ")]
    assert len(kernels) == 1, program.stderr[-3000:]
    assert kernels[0]["tensor cores"]
    assert kernels[0]["cubin"] > 100_000
    assert 0 < kernels[0]["shared"] <= SHARED_BYTES == 227 * 1024
