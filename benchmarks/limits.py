"""Count the FLOPs of a learner step and measure this machine's peak rate:  python -m benchmarks.limits OVERRIDE ...

The last line printed is JSON: floating-point operations of one step's matmuls, and operations per second.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.bare import learning, opened
from othink_ray.cpu.kernels import matmul
from othink_ray.engines.base import share_of_cores

_SIDE = 1024
_TRIES = 30


def main(overrides: Sequence[str]) -> None:
    config, path, stream = opened(overrides)
    # The counter sees only matmuls that torch dispatches, and no fused attention.
    plain = replace(config.learner, onednn=False, compile=False, attention="blocks")
    step = learning(replace(config, learner=plain), path)
    with FlopCounterMode(display=False) as counter:
        step(stream.take(config.train.prompts_per_step))
    torch.set_num_threads(share_of_cores(config.learner.threads, 1))
    print(json.dumps({"operations": counter.get_total_flops(), "a_second": peak_rate()}))


def peak_rate() -> float:
    """Return the FLOP/s of the fastest of several square float32 matmuls."""
    left, right = torch.rand(_SIDE, _SIDE), torch.rand(_SIDE, _SIDE)
    seconds = []
    for _ in range(_TRIES):
        start = time.perf_counter()
        matmul(left, right, None)
        seconds.append(time.perf_counter() - start)
    return float(2 * _SIDE**3 / min(seconds))


if __name__ == "__main__":
    main(sys.argv[1:])
