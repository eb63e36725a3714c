"""The memory limit of a reward actor."""

from __future__ import annotations

import subprocess
import sys


def test_a_reward_actor_may_take_so_much_more_memory_than_it_has() -> None:
    """Not so much in all: what Python and its modules take is no fault of a reward function."""
    program = """
from othink_ray.runtime.reward_actor import _limit_memory
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
