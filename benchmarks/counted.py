"""One update of the learner under a counter of allocations:  python -m benchmarks.counted OVERRIDE ...

Its last line is the number of bytes that all tensors of the process have at their peak.
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
    """Bytes that all CPU tensors of the process hold at the peak of one update, weights included."""
    turn = learning(config, path)
    with Allocations() as seen:
        seen.note(thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor))
        turn(prompts)
    peak: int = seen.peak
    return peak


if __name__ == "__main__":
    main(sys.argv[1:])
