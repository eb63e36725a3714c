"""Count the allocations of one learner update:  python -m benchmarks.counted OVERRIDE ...

The last line printed is the peak number of bytes of all CPU tensors of the process.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence

import torch

from benchmarks.allocations import Allocations
from benchmarks.bare import learning, opened
from othink_ray.config.schema import Config
from othink_ray.types import Prompt


def main(overrides: Sequence[str]) -> None:
    config, path, stream = opened(overrides)
    print(peak_of_update(config, path, stream.take(config.train.prompts_per_step)))


def peak_of_update(config: Config, path: str, prompts: Sequence[Prompt]) -> int:
    """Return the bytes that all CPU tensors of the process hold at the peak of one update, weights included."""
    step = learning(config, path)
    with Allocations() as allocations:
        allocations.note(item for item in gc.get_objects() if issubclass(type(item), torch.Tensor))
        step(prompts)
    peak: int = allocations.peak
    return peak


if __name__ == "__main__":
    main(sys.argv[1:])
