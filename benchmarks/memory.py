"""The memory of one whole step of Qwen2-VL-2B, random weights and adapters: planned, counted, and held by processes.

  python -m benchmarks.memory [--layers N] [--dir FOLDER] [a.b=value ...]

Makes the model's folder, computes the plan of mode=check, makes one real step (Ray, vLLM, DeepSpeed; generate, score,
update, push, audit) while it looks at every process, and counts the allocations of the same update in a process of its
own. Nothing is downloaded. Needs 5 GB of disk and most of 24 GiB of memory; with --layers 2 a quarter of it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks import ours
from benchmarks.gpu.shapes import SHAPES, Shape, write_model
from benchmarks.machine import machine
from benchmarks.processes import TOGETHER, Watch
from othink_ray.config.load import load
from othink_ray.config.schema import Config
from othink_ray.driver.memory_check import measure
from othink_ray.driver.memory_plan import GIB, PROCESS, memory_plan
from othink_ray.driver.stopping import interrupted_status, interruptible
from othink_ray.families import open_family
from othink_ray.runtime.placement import PROCESS_ENVIRONMENT

SHAPE = "qwen2_vl_2b"
# Answers of an untaught model are all worth nothing; random rewards give the update a gradient.
REWARD = """
import random

def chance(text, answer):
    return random.random()
"""
# The step's two packed sequences fill learner.micro_tokens, so that the plan is of the same micro-batch.
STEP = (
    *("algo=grpo", "algo.group_size=2", "data.scenes.image_cells=16", "model.max_pixels=200704"),
    *("learner.lora.rank=16", "learner.gradient_checkpointing=true", "learner.lr=1e-5", "learner.warmup_frac=0"),
    *("learner.micro_tokens=816", "rollout.max_model_len=400", "rollout.max_tokens=16", "rollout.fixed_length=true"),
    *("rollout.max_num_seqs=8", "train.steps=1", "train.prompts_per_step=2", "train.checkpoint_every=0"),
    *("eval.every=0", "eval.questions=1"),
)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--layers", type=int, help="of each tower; else all of them")
    parser.add_argument(
        "--dir", type=Path, help="folder for the model, the run and memory.json; else one that is removed"
    )
    parser.add_argument("overrides", nargs="*", help="other settings of the step")
    asked = parser.parse_args(arguments)
    folder = asked.dir or Path(tempfile.mkdtemp(prefix="othink_ray_memory_"))
    passing = folder  # what is removed where no folder was named
    try:
        with interruptible():
            found = measured(folder.absolute(), shape_of(asked.layers), asked.overrides)
    except ours.BenchError as error:
        print(f"stopped: {error}", file=sys.stderr)
        passing = folder / "model"  # the message names a log in the folder
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return interrupted_status()
    finally:
        if asked.dir is None:
            shutil.rmtree(passing, ignore_errors=True)
    print(table(found))
    return 0


def shape_of(layers: int | None) -> Shape:
    """Qwen2-VL-2B with so many layers in each tower: its widths, heads and vocabulary stay."""
    shape = SHAPES[SHAPE]
    if layers is None:
        return shape
    return replace(shape, text=shape.text | {"num_hidden_layers": layers}, vision=shape.vision | {"depth": layers})


def settings(folder: Path, more: Sequence[str]) -> list[str]:
    """Overrides of the step, whose model and reward are made in the folder."""
    reward = folder / "reward.py"
    reward.write_text(REWARD)
    own = (f"model={SHAPE}", f"model.path={folder / 'model'}", f"run.dir={folder / 'run'}")
    return [*own, *STEP, f"algo.reward.own={reward}:chance", *more]


def measured(folder: Path, shape: Shape, more: Sequence[str]) -> dict[str, Any]:
    """Make the model, plan, count and run its step; what is found is also written to memory.json in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_model(shape, folder / "model", torch.device("cpu"), "bfloat16")
    overrides = settings(folder, more)
    config = load(overrides)
    found = {
        "machine": machine(),
        "memory": psutil.virtual_memory().total,
        "planned": planned(config),
        "counted": counted(overrides, folder / "counted.txt"),
        "run": watched(overrides, folder),
    }
    (folder / "memory.json").write_text(json.dumps(found, indent=1))
    return found


def planned(config: Config) -> dict[str, dict[str, float]]:
    """Bytes by what they are for, as mode=check adds them up for a learner rank and an engine."""
    assert config.model.path is not None
    sizes = measure(config, open_family(config.model, config.model.path))
    plan = memory_plan(config, sizes.shape, sizes.work, sizes.sampling, card=None)
    return {name: dict(plan.peak(name).uses) for name in plan.devices}


def counted(overrides: Sequence[str], log: Path) -> int:
    """Bytes that the learner has allocated at the peak of its update, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.counted", *overrides]
    ours.run(command, log, {**os.environ, **PROCESS_ENVIRONMENT})
    return int(log.read_text().splitlines()[-1])


def watched(overrides: Sequence[str], folder: Path) -> dict[str, Any]:
    """The run: bytes of its processes in each of its phases, their seconds, and the audit after the step."""
    run, watch = folder / "run", Watch()
    shutil.rmtree(run, ignore_errors=True)
    ours.run([sys.executable, "-m", "othink_ray.main", *overrides], folder / "run.txt", watch=watch.of)
    [step] = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    windows = _windows(json.loads((run / "trace.json").read_text()), ended_s=step["time/unix_s"])
    return {
        "held": {phase: watch.peaks(*window) for phase, window in windows.items()},
        "seconds": {phase: end - start for phase, (start, end) in windows.items() if start},
        "step": {name: step[name] for name in _TOLD},
    }


_TOLD = ("time/step_s", "grad_norm", "push/mb", "audit/logp_gap_mean", "audit/logp_gap_max", "audit/tolerance")


def _windows(events: Sequence[Mapping[str, Any]], ended_s: float) -> dict[str, tuple[float, float]]:
    """When each phase began and ended; the last evaluation ends when the step's metrics are written, at `ended_s`."""
    spans: dict[str, list[tuple[float, float]]] = {}
    for event in events:
        if event["ph"] == "X":
            spans.setdefault(event["name"], []).append((event["ts"] / 1e6, (event["ts"] + event["dur"]) / 1e6))
    origin_s = ended_s - spans["evaluate"][-1][1]
    first_push, push = spans["push"]
    found = {"first push": first_push, "generate": spans["score"][0], "update": spans["update"][0], "push": push}
    found["export"] = spans["export"][-1]
    placed = {phase: (origin_s + start, origin_s + end) for phase, (start, end) in found.items()}
    return {"load": (0.0, placed["first push"][0]), **placed}


def table(found: Mapping[str, Any]) -> str:
    """GiB: of each process in each phase, then what was planned beside what was counted."""
    run = found["run"]
    roles = sorted({role for held in run["held"].values() for role in held} - {TOGETHER})
    rows = [f"{'GiB':<14}" + "".join(f"{phase:>12}" for phase in run["held"])]
    for role in (*roles, TOGETHER):
        rows.append(f"{role:<14}" + "".join(f"{held.get(role, 0) / GIB:>12.2f}" for held in run["held"].values()))
    rows.append(f"{'seconds':<14}" + "".join(f"{run['seconds'].get(phase, 0):>12.1f}" for phase in run["held"]))
    for name, uses in found["planned"].items():
        rows.append(f"planned for {name}: {sum(uses.values()) / GIB:.2f}")
        rows += [f"  {use:<20}{held / GIB:>6.2f}" for use, held in uses.items()]
    planned = sum(found["planned"]["a learner rank"].values()) - PROCESS
    counted = found["counted"]
    rows.append(f"learner, planned {planned / GIB:.2f}, counted {counted / GIB:.2f}: {planned / counted - 1:+.1%}")
    return "\n".join([*rows, *(f"{name:<22}{value:.6g}" for name, value in run["step"].items())])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
