"""The parts of the check; run one part in this process:  python -m benchmarks.gpu.parts NAME FOLDER"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from benchmarks.gpu.rows import Row, failed


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A function of a module of this package, imported only in the part's process: its dependencies may be missing."""

    module: str
    function: str
    seconds: int  # time limit
    model: str = "qwen2_vl_2b"
    needs: tuple[str, ...] = ("torch", "transformers")

    def missing(self) -> list[str]:
        return [name for name in self.needs if find_spec(name) is None]


_VLLM = ("torch", "transformers", "vllm")
# In this order: slow parts with little information come last.
PARTS = {
    "device": Part(module="learning", function="device", seconds=60),
    "learn 2B": Part(module="learning", function="learn", seconds=150),
    "generate 2B": Part(module="generating", function="generate", seconds=180, needs=_VLLM),
    "colocated": Part(module="colocated", function="colocated", seconds=180, needs=_VLLM),
    "NCCL": Part(module="colocated", function="apart", seconds=120),
    "padded": Part(module="learning", function="padded", seconds=90),
    "memory": Part(module="learning", function="memory", seconds=90),
    "kernels": Part(module="learning", function="kernels", seconds=90),
    "learn 3B": Part(module="learning", function="learn", seconds=150, model="qwen2_5_vl_3b"),
    "generate 3B": Part(module="generating", function="generate", seconds=180, model="qwen2_5_vl_3b", needs=_VLLM),
    "shared memory": Part(module="colocated", function="by_memory", seconds=150, needs=_VLLM),
    "demo": Part(module="demo", function="demo", seconds=180, needs=(*_VLLM, "ray", "deepspeed", "hydra")),
}


def main(name: str, folder: str) -> int:
    part = PARTS[name]
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that child processes are cleaned up
    states = set()
    for row in _rows(part, Path(folder)):
        states.add(row.state)
        print(json.dumps(row.record()), flush=True)
    return 1 if "failed" in states else 0


def _rows(part: Part, folder: Path) -> Iterator[Row]:
    from benchmarks.gpu.setup import Setup

    try:
        run = getattr(import_module(f"benchmarks.gpu.{part.module}"), part.function)
        yield from run(Setup(folder=folder, name=part.model))
    except Exception as error:  # an engine may raise anything; the check goes on with the next part
        yield failed("did not finish", error)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
