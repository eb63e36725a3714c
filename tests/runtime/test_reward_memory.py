"""Memory limit of a reward actor."""

from __future__ import annotations

import subprocess
import sys


def test_the_memory_limit_counts_from_present_use() -> None:
    """Memory of Python and its modules is not charged to the reward function."""
    program = """
from othink_ray.runtime.reward_pool import _limit_memory
MB = 2**20
before = bytearray(300 * MB)
_limit_memory(200)
within = bytearray(100 * MB)
try:
    beyond = bytearray(150 * MB)
except MemoryError:
    print("refused")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "refused\n"
