"""The tiny demo as a complete run on the GPU and on the CPU, to compare their reward curves."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from functools import partial

from benchmarks.gpu.rows import Figures, Row, measure_each
from benchmarks.gpu.setup import Setup
from benchmarks.ours import run

STEPS = 20
_SIDES = {"one_gpu": ("cluster=one_gpu",), "cpu": ("cluster=local", "rollout=hf")}
_TIMES = ("step", "generate", "update", "push")


def demo(setup: Setup) -> Iterator[Row]:
    """Run the demo on GPU and CPU; vLLM's GPU build has no CPU engine, so transformers generates on the CPU."""
    return measure_each((name, partial(_side, setup, name, settings)) for name, settings in _SIDES.items())


def _side(setup: Setup, name: str, settings: Sequence[str]) -> Figures:
    folder = setup.folder / f"demo_{name}"
    overrides = [f"run.dir={folder}", f"run.cache_dir={setup.folder / 'cache'}", f"train.steps={STEPS}", "model=tiny"]
    short = ["eval.every=0", "eval.questions=32", "train.checkpoint_every=0"]
    run([sys.executable, "-m", "othink_ray.main", *settings, *overrides, *short], folder.with_suffix(".txt"))
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return curve([record for record in records if "time/step_s" in record])


def curve(steps: Sequence[dict[str, float]]) -> Figures:
    """Return the mean reward of every five steps, the median seconds of each phase, and the largest mean audit gap."""
    rewards = [step["reward/mean"] for step in steps]
    means = [statistics.mean(rewards[start : start + 5]) for start in range(0, len(rewards), 5)]
    times = {f"{part} s": statistics.median(step[f"time/{part}_s"] for step in steps) for part in _TIMES}
    gap = {"audit gap mean": max(step["audit/logp_gap_mean"] for step in steps)}
    return {"rewards": " ".join(f"{mean:.3f}" for mean in means), **times, **gap}
