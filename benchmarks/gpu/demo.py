"""The tiny demo as a whole run on the GPU, and the same on this machine's CPU: two curves side by side."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from functools import partial

from benchmarks.gpu.rows import Figures, Row, each
from benchmarks.gpu.setup import Setup
from benchmarks.ours import run

STEPS = 20
_SIDES = {"one_gpu": ("cluster=one_gpu",), "cpu": ("cluster=local", "rollout=hf")}
_TIMES = ("step", "generate", "update", "push")


def demo(setup: Setup) -> Iterator[Row]:
    """vLLM's build for GPUs has no engine for CPUs: there transformers generates."""
    return each((name, partial(_side, setup, name, settings)) for name, settings in _SIDES.items())


def _side(setup: Setup, name: str, settings: Sequence[str]) -> Figures:
    folder = setup.folder / f"demo_{name}"
    own = [f"run.dir={folder}", f"run.cache_dir={setup.folder / 'cache'}", f"train.steps={STEPS}", "model=tiny"]
    short = ["eval.every=0", "eval.questions=32", "train.checkpoint_every=0"]
    run([sys.executable, "-m", "othink_ray.main", *settings, *own, *short], folder.with_suffix(".txt"))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return curve([line for line in lines if "time/step_s" in line])


def curve(steps: Sequence[dict[str, float]]) -> Figures:
    """Mean rewards of every five steps, and where a step's time went."""
    rewards = [step["reward/mean"] for step in steps]
    means = [statistics.mean(rewards[start : start + 5]) for start in range(0, len(rewards), 5)]
    times = {f"{part} s": statistics.median(step[f"time/{part}_s"] for step in steps) for part in _TIMES}
    gap = {"audit gap mean": max(step["audit/logp_gap_mean"] for step in steps)}
    return {"rewards": " ".join(f"{mean:.3f}" for mean in means), **times, **gap}
