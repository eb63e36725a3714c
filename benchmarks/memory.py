"""Memory of one complete step of Qwen2-VL-2B with random weights and adapters: planned, counted, and measured.

  python -m benchmarks.memory [--layers N] [--dir FOLDER] [a.b=value ...]

Writes the model's folder, computes the plan of mode=check, runs one real step (Ray, vLLM, DeepSpeed; generate, score,
update, push, audit) while sampling the memory of every process, and counts the allocations of the same update in a
separate process. Downloads nothing. Needs 5 GB of disk and most of 24 GiB of memory; with --layers 2 a quarter of that.
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
from benchmarks.processes import TOGETHER, MemoryMonitor
from othink_ray.config.load import load
from othink_ray.config.schema import Config
from othink_ray.driver.memory_check import measure
from othink_ray.driver.memory_plan import GIB, PROCESS, memory_plan
from othink_ray.driver.stopping import interrupted_status, interruptible
from othink_ray.families import open_family
from othink_ray.runtime.placement import PROCESS_ENVIRONMENT

SHAPE = "qwen2_vl_2b"
# An untrained model's answers all score 0; random rewards give the update a gradient.
REWARD = """
import random

def random_reward(text, answer):
    return random.random()
"""
# The step's two packed samples fill learner.micro_tokens, so that plan and run have the same micro-batch.
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
    parser.add_argument("--layers", type=int, help="layers of each tower (default: all)")
    parser.add_argument(
        "--dir", type=Path, help="folder for the model, the run and memory.json (default: a temporary one)"
    )
    parser.add_argument("overrides", nargs="*", help="other overrides of the step")
    args = parser.parse_args(arguments)
    folder = args.dir or Path(tempfile.mkdtemp(prefix="othink_ray_memory_"))
    temporary = folder  # removed unless --dir is given
    try:
        with interruptible():
            results = measured(folder.absolute(), shape_of(args.layers), args.overrides)
    except ours.BenchError as error:
        print(f"stopped: {error}", file=sys.stderr)
        temporary = folder / "model"  # keep the log that the message names
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return interrupted_status()
    finally:
        if args.dir is None:
            shutil.rmtree(temporary, ignore_errors=True)
    print(table(results))
    return 0


def shape_of(layers: int | None) -> Shape:
    """Return Qwen2-VL-2B with `layers` layers in each tower, its widths, heads and vocabulary unchanged."""
    shape = SHAPES[SHAPE]
    if layers is None:
        return shape
    return replace(shape, text=shape.text | {"num_hidden_layers": layers}, vision=shape.vision | {"depth": layers})


def settings(folder: Path, more: Sequence[str]) -> list[str]:
    """Return the overrides of the step, with model and reward in the folder; writes the reward."""
    reward = folder / "reward.py"
    reward.write_text(REWARD)
    paths = (f"model={SHAPE}", f"model.path={folder / 'model'}", f"run.dir={folder / 'run'}")
    return [*paths, *STEP, f"algo.reward.custom={reward}:random_reward", *more]


def measured(folder: Path, shape: Shape, more: Sequence[str]) -> dict[str, Any]:
    """Write the model, then plan, count and run its step; the result is also written to the folder's memory.json."""
    folder.mkdir(parents=True, exist_ok=True)
    write_model(shape, folder / "model", torch.device("cpu"), "bfloat16")
    overrides = settings(folder, more)
    config = load(overrides)
    results = {
        "machine": machine(),
        "memory": psutil.virtual_memory().total,
        "planned": planned(config),
        "counted": counted(overrides, folder / "counted.txt"),
        "run": watched(overrides, folder),
    }
    (folder / "memory.json").write_text(json.dumps(results, indent=1))
    return results


def planned(config: Config) -> dict[str, dict[str, float]]:
    """Return the planned bytes by purpose, for a learner rank and for an engine, as mode=check computes them."""
    assert config.model.path is not None
    sizes = measure(config, open_family(config.model, config.model.path))
    plan = memory_plan(config, sizes.shape, sizes.work, sizes.sampling, card=None)
    return {name: dict(plan.peak(name).uses) for name in plan.devices}


def counted(overrides: Sequence[str], log: Path) -> int:
    """Return the bytes that the learner holds at the peak of its update, counted in a separate process."""
    command = [sys.executable, "-m", "benchmarks.counted", *overrides]
    ours.run(command, log, {**os.environ, **PROCESS_ENVIRONMENT})
    return int(log.read_text().splitlines()[-1])


def watched(overrides: Sequence[str], folder: Path) -> dict[str, Any]:
    """Run the step; return peak bytes by role in each phase, seconds of each phase, and metrics of the step."""
    run, monitor = folder / "run", MemoryMonitor()
    shutil.rmtree(run, ignore_errors=True)
    ours.run([sys.executable, "-m", "othink_ray.main", *overrides], folder / "run.txt", watch=monitor.of)
    [step] = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    windows = _windows(json.loads((run / "trace.json").read_text()), ended_s=step["time/unix_s"])
    return {
        "held": {phase: monitor.peaks(*window) for phase, window in windows.items()},
        "seconds": {phase: end - start for phase, (start, end) in windows.items() if start},
        "step": {name: step[name] for name in _STEP_METRICS},
    }


_STEP_METRICS = ("time/step_s", "grad_norm", "push/mb", "audit/logp_gap_mean", "audit/logp_gap_max", "audit/tolerance")


def _windows(events: Sequence[Mapping[str, Any]], ended_s: float) -> dict[str, tuple[float, float]]:
    """Return Unix start and end of each phase; the last evaluation ends at `ended_s`, when the metrics are written."""
    spans: dict[str, list[tuple[float, float]]] = {}
    for event in events:
        if event["ph"] == "X":
            spans.setdefault(event["name"], []).append((event["ts"] / 1e6, (event["ts"] + event["dur"]) / 1e6))
    origin_s = ended_s - spans["evaluate"][-1][1]
    first_push, push = spans["push"]
    phases = {"first push": first_push, "generate": spans["score"][0], "update": spans["update"][0], "push": push}
    phases["export"] = spans["export"][-1]
    windows = {phase: (origin_s + start, origin_s + end) for phase, (start, end) in phases.items()}
    return {"load": (0.0, windows["first push"][0]), **windows}


def table(results: Mapping[str, Any]) -> str:
    """Return a table in GiB: each role in each phase, then the plan against the count."""
    run = results["run"]
    roles = sorted({role for held in run["held"].values() for role in held} - {TOGETHER})
    rows = [f"{'GiB':<14}" + "".join(f"{phase:>12}" for phase in run["held"])]
    for role in (*roles, TOGETHER):
        rows.append(f"{role:<14}" + "".join(f"{held.get(role, 0) / GIB:>12.2f}" for held in run["held"].values()))
    rows.append(f"{'seconds':<14}" + "".join(f"{run['seconds'].get(phase, 0):>12.1f}" for phase in run["held"]))
    for name, uses in results["planned"].items():
        rows.append(f"planned for {name}: {sum(uses.values()) / GIB:.2f}")
        rows += [f"  {use:<20}{held / GIB:>6.2f}" for use, held in uses.items()]
    planned = sum(results["planned"]["a learner rank"].values()) - PROCESS
    counted = results["counted"]
    rows.append(f"learner, planned {planned / GIB:.2f}, counted {counted / GIB:.2f}: {planned / counted - 1:+.1%}")
    return "\n".join([*rows, *(f"{name:<22}{value:.6g}" for name, value in run["step"].items())])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
