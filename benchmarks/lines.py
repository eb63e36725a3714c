"""Checks of this system alone, a function per key of CHECKS; each compares measured values with their limits."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from benchmarks import ours
from benchmarks.times import spread, spreads
from benchmarks.turns import Program, in_turn
from benchmarks.work import Workload

USUAL = Workload(prompts=8, answers=8, tokens=64, cells=4)
_TOLERANCE = 1e-4  # of losses and KLs
_TURNS = 12
SWITCHES = (
    "learner.compile=false",
    "learner.onednn=false",
    "learner.attention=dense",
    "learner.shared_prefix=false",
    "learner.prune_last_layer=false",
    "learner.micro_tokens=1024",
    "learner.logit_rows=128",
    "learner.gradient_checkpointing=true",
    "rollout.prefix_caching=false",
    "rollout.balance=false",
    "train.prefetch_prompts=false",
    "weights.bucket_mb=1",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitCheck:
    """A measured value and its limit; `detail` holds the measurements behind it."""

    name: str
    value: float
    limit: float
    higher_is_better: bool = False
    detail: dict[str, Any] = field(default_factory=dict)

    @property
    def holds(self) -> bool:
        return self.value >= self.limit if self.higher_is_better else self.value <= self.limit

    def record(self) -> dict[str, Any]:
        limit = {"at_least" if self.higher_is_better else "at_most": self.limit}
        return {"name": self.name, "found": self.value, **limit, "holds": self.holds, "detail": self.detail}

    def __str__(self) -> str:
        sign = ">=" if self.higher_is_better else "<="
        return f"  {'ok ' if self.holds else 'NOT'} {self.name:<62} {self.value:8.3g}   {sign} {self.limit:g}"


class Runs:
    """Cache of runs by kind, workload and overrides; each runs once."""

    def __init__(self, folder: Path, steps: int) -> None:
        self.folder, self.steps = folder, steps
        self.cache: dict[tuple[Any, ...], Any] = {}

    def metrics(self, work: Workload, *overrides: str) -> list[dict[str, Any]]:
        """Return the metrics of the timed steps of a run."""
        metrics: list[dict[str, Any]] = self._once(
            ("run", work, overrides), lambda folder: ours.train(work, self.steps, folder, overrides)
        )
        return metrics

    def times(self, work: Workload, *overrides: str) -> dict[str, dict[str, float]]:
        """Return median, min, max and count of the seconds of each phase of a step, and of the whole."""
        return spreads(self.metrics(work, *overrides))

    def bare(self, parts: Sequence[str], work: Workload, *overrides: str) -> dict[str, list[float]]:
        """Return the seconds of each step of each engine; the engines run in separate processes at the same time."""
        seconds: dict[str, list[float]] = self._once(
            (" and ".join(parts), work, overrides), lambda folder: ours.bare(parts, work, self.steps, folder, overrides)
        )
        return seconds

    def limits(self, work: Workload, *overrides: str) -> dict[str, float]:
        """Return the FLOPs of a learner step, and the FLOP/s of this machine."""
        rates: dict[str, float] = self._once(
            ("limits", work, overrides), lambda folder: ours.limits(work, folder, overrides)
        )
        return rates

    def _once(self, key: tuple[Any, ...], make: Callable[[Path], Any]) -> Any:
        if key not in self.cache:
            print(f"    {key[0]} {key[1]} {' '.join(key[2])}", flush=True)
            self.cache[key] = make(self.folder / f"run_{len(self.cache)}")
        return self.cache[key]


def rows(runs: Runs) -> list[LimitCheck]:
    """Speedup of shared-prefix packing over padded samples in transformers.

    `detail` also compares this learner with and without packing.
    """
    checks = []
    for cells, limit in ((2, 1.0), (12, 3.5), (24, 6.0)):
        work = replace(USUAL, cells=cells)
        shared = spread(runs.bare(["learn"], work)["learn"])
        padded = spread(runs.bare(["learn_padded"], work)["learn_padded"])
        single = spread(runs.bare(["learn"], work, "learner.shared_prefix=false")["learn"])
        detail: dict[str, Any] = {"shared_s": shared, "padded_s": padded, "single_s": single}
        detail["this learner on single samples / on packed samples"] = single["median"] / shared["median"]
        name = f"learner: speedup over padded samples, {work.image_tokens} image tokens"
        speedup = padded["median"] / shared["median"]
        checks.append(LimitCheck(name=name, value=speedup, limit=limit, higher_is_better=True, detail=detail))
    return checks


def loop(runs: Runs) -> list[LimitCheck]:
    """Overhead of Ray, scoring and pushes over the bare engines, sequential and overlapped.

    The value is the median of the turns' ratios, so that a slow phase of the machine affects a single turn.
    """

    def bare(part: str, *overrides: str) -> Program:
        suffix = "_beside" if overrides else ""
        return ours.bare_training(part, USUAL, runs.folder / f"{part}{suffix}.txt", overrides)

    plain = _in_turn(
        runs.steps,
        {"step_s": ours.training(USUAL, runs.folder / "plain", ())},
        {"generate": bare("generate")},
        {"learn": bare("learn")},
    )
    one_core = ("rollout.threads=1", "learner.threads=1")
    overlapped = _in_turn(
        runs.steps,
        {"step_s": ours.training(USUAL, runs.folder / "overlapped", ("train.overlap=true",))},
        {part: bare(part, *one_core) for part in ("generate", "learn")},
    )
    return [
        _ratio("plain step / (bare generate + bare learn)", 1.10, plain, sum),
        _ratio("overlapped step / max(bare generate, bare learn), concurrent, a core each", 1.15, overlapped, max),
    ]


def _in_turn(steps: int, *sides: Mapping[str, Program]) -> list[dict[str, list[float]]]:
    print(f"    in turn: {', '.join(' and '.join(side) for side in sides)}", flush=True)
    return in_turn(sides, _TURNS, steps)


def _ratio(
    name: str, limit: float, turns: Sequence[dict[str, list[float]]], combine: Callable[[list[float]], float]
) -> LimitCheck:
    """Return the median over turns of step / combine(generate, learn), each the median within its turn."""
    medians = [{part: median(seconds) for part, seconds in turn.items()} for turn in turns]
    ratios = [turn["step_s"] / combine([turn["generate"], turn["learn"]]) for turn in medians]
    detail: dict[str, Any] = {part: spread([s for turn in turns for s in turn[part]]) for part in turns[0]}
    return LimitCheck(name=name, value=median(ratios), limit=limit, detail=detail | {"turns": ratios})


def limits(runs: Runs) -> list[LimitCheck]:
    """Share of this machine's matmul rate that each engine reaches; the rest is everything except matmuls."""
    return [
        check for cells in (4, 12, 24) for check in _shares(runs, replace(USUAL, cells=cells), learn=0.0, generate=0.0)
    ]


def pretrained(runs: Runs) -> list[LimitCheck]:
    """The shares of `limits` for a pretrained language model with a real vocabulary: matmuls take more of its steps.

    Each engine is also compared with its matmuls replayed alone, at their shapes: sampling multiplies few rows at a
    time by all weights, so it is bound by reading weights and stays below the cores' best rate.
    """
    work = replace(USUAL, cells=8, model="smol")
    over_matmuls = [_over_matmuls(runs, work, part, limit) for part, limit in (("learn", 1 / 0.75), ("generate", 1.5))]
    return [*_shares(runs, work, learn=0.0, generate=0.0), *over_matmuls]


def _over_matmuls(runs: Runs, work: Workload, part: str, limit: float) -> LimitCheck:
    whole, matmuls = (spread(runs.bare([name], work)[name]) for name in (part, f"{part}_matmuls"))
    name = f"{part}: time / time of its matmuls alone, {work}"
    detail = {"s": whole, "matmuls_s": matmuls}
    return LimitCheck(name=name, value=whole["median"] / matmuls["median"], limit=limit, detail=detail)


def _shares(runs: Runs, work: Workload, **limits_by_part: float) -> list[LimitCheck]:
    """Return each engine's share of the peak matmul rate.

    Sampling needs at least one forward pass: the difference between a step with a reference policy and one without.
    """
    whole, without = runs.limits(work), runs.limits(work, "algo.kl.beta_min=0", "algo.kl.beta_max=0")
    operations = {"learn": whole["operations"], "generate": whole["operations"] - without["operations"]}
    checks = []
    for part, limit in limits_by_part.items():
        measured = spread(runs.bare([part], work)[part])
        share = operations[part] / whole["a_second"] / measured["median"]
        detail = {"gflop": operations[part] / 1e9, "gflop_a_second": whole["a_second"] / 1e9, "s": measured}
        name = f"{part}: share of the peak matmul rate, {work}"
        checks.append(LimitCheck(name=name, value=share, limit=limit, higher_is_better=True, detail=detail))
    return checks


def push(runs: Runs) -> list[LimitCheck]:
    """Shares of a step: push with audit, and scoring."""
    times = runs.times(replace(USUAL, cells=8))
    step = times["step_s"]["median"]
    return [
        LimitCheck(name="push and audit / step, 64 image tokens", value=times["push_s"]["median"] / step, limit=0.05),
        LimitCheck(name="scoring / step, 64 image tokens", value=times["score_s"]["median"] / step, limit=0.02),
    ]


def cost(runs: Runs) -> list[LimitCheck]:
    """Scaling with prompts, answer tokens and image tokens; a step's fixed cost puts the first two below 1."""

    def seconds(work: Workload) -> float:
        times = runs.times(work)
        return times["generate_s"]["median"] + times["update_s"]["median"]

    prompts = [seconds(replace(USUAL, prompts=count)) for count in (4, 8, 16)]
    tokens = [seconds(replace(USUAL, tokens=count)) for count in (32, 64, 128)]
    images = [seconds(replace(USUAL, answers=16, cells=cells)) for cells in (4, 12)]
    return [
        LimitCheck(name="4 times the prompts / 4", value=prompts[2] / prompts[0] / 4, limit=1.1, detail={"s": prompts}),
        LimitCheck(
            name="4 times the answer tokens / 4", value=tokens[2] / tokens[0] / 4, limit=1.1, detail={"s": tokens}
        ),
        LimitCheck(
            name="144 image tokens / 16, 16 answers", value=images[1] / images[0], limit=1.6, detail={"s": images}
        ),
    ]


def ranks(runs: Runs) -> list[LimitCheck]:
    """Speedup of two single-threaded processes over one process with two threads, on the same cores."""
    one, learners, actors = (
        runs.times(USUAL, *more) for more in ((), ("learner.world_size=2",), ("rollout.num_actors=2",))
    )
    return [
        LimitCheck(
            name=f"{name}: speedup over one",
            value=one[part]["median"] / two[part]["median"],
            limit=1.0,
            higher_is_better=True,
            detail={"one": one[part], "two": two[part]},
        )
        for name, part, two in (("2 learner ranks", "update_s", learners), ("2 rollout actors", "generate_s", actors))
    ]


def switches(runs: Runs) -> list[LimitCheck]:
    """Largest change of losses and KLs when one optimization is switched off."""

    def curve(*overrides: str) -> list[float]:
        return [metrics[key] for metrics in runs.metrics(USUAL, *overrides) for key in ("loss", "kl/mean")]

    checks = []
    needs_overlap = {"train.prefetch_update=false": ("train.overlap=true",)}
    for switch, others in {**dict.fromkeys(SWITCHES, ()), **needs_overlap}.items():
        on, off = curve(*others), curve(*others, switch)
        distance = max(abs(with_it - without) for with_it, without in zip(on, off, strict=True))
        checks.append(
            LimitCheck(name=f"loss and KL with {switch}", value=distance, limit=_TOLERANCE, detail={"off": off})
        )
    return checks


def memory(runs: Runs) -> list[LimitCheck]:
    """Memory growth over 200 steps with checkpoints: the driver in MB, and the actor that grows most, as a share.

    Counted from the first quarter on: by then the learner has saved twice and holds its checkpoint buffer.
    """
    samples: list[tuple[float, dict[str, float]]] = []  # (unix seconds, MB by process)
    done = threading.Event()

    def watch() -> None:
        while not done.wait(2.0):
            samples.append((time.time(), _resident()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        steps = ours.train(replace(USUAL, tokens=16), 200, runs.folder / "memory", ("train.checkpoint_every=25",))
    finally:
        done.set()
        watcher.join()
    quarter_s, end_s = (steps[index]["time/unix_s"] for index in (len(steps) // 4, -1))
    in_window = [resident for at_s, resident in samples if quarter_s <= at_s <= end_s]
    early, late = in_window[0], in_window[-1]
    growth = {name: late[name] - mb for name, mb in early.items() if name in late}
    actors = {name: mb / early[name] for name, mb in growth.items() if name != "driver"}
    detail = {"early_mb": early, "late_mb": late}
    return [
        LimitCheck(name="driver's growth over 200 steps, MB", value=growth["driver"], limit=100, detail=detail),
        LimitCheck(name="largest growth of an actor over 200 steps, share", value=max(actors.values()), limit=0.05),
    ]


def _resident() -> dict[str, float]:
    """Return the resident MB of the driver and of each actor among the descendants of this process."""
    resident: dict[str, float] = {}
    for process in psutil.Process().children(recursive=True):
        try:
            command, mb = " ".join(process.cmdline()), process.memory_info().rss / 2**20
        except psutil.Error:
            continue
        role = next((role for role in ("Learner", "Rollout", "Reward") if f"ray::{role}" in command), None)
        if "othink_ray.main" in command:
            resident["driver"] = mb
        elif role:
            resident[f"{role.lower()} {process.pid}"] = mb
    return resident


def start(runs: Runs) -> list[LimitCheck]:
    """Seconds from the command to the end of the demo's first step; an unmeasured first run trains the base model."""
    for folder in (runs.folder / "first_start", runs.folder / "start"):
        command = ["-m", "othink_ray.main", f"run.dir={folder}", "train.steps=1", "eval.every=0", "eval.questions=1"]
        began = time.time()
        ours.run([sys.executable, *command], folder.with_suffix(".txt"))
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    seconds = next(record["time/unix_s"] for record in records if "time/step_s" in record) - began
    return [LimitCheck(name="start of the demo to the end of its first step, s", value=seconds, limit=25.0)]


CHECKS: dict[str, Callable[[Runs], Sequence[LimitCheck]]] = {
    function.__name__: function
    for function in (rows, loop, limits, pretrained, push, cost, ranks, switches, memory, start)
}
