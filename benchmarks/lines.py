"""What `make bench` asks of this system alone, one function a line; each gives what was found and what was wanted."""

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
from benchmarks.work import Work

USUAL = Work(prompts=8, answers=8, tokens=64, cells=4)
_ALIKE = 1e-4
_TURNS = 12
SWITCHES = (
    "learner.compile=false",
    "learner.onednn=false",
    "learner.attention=dense",
    "learner.shared_prefix=false",
    "learner.narrow_last_layer=false",
    "learner.micro_tokens=1024",
    "learner.logit_rows=128",
    "learner.gradient_checkpointing=true",
    "rollout.prefix_caching=false",
    "rollout.balance=false",
    "train.read_ahead=false",
    "weights.bucket_mb=1",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """`found` beside its limit; `detail` holds what it was made of."""

    name: str
    found: float
    limit: float
    more_is_better: bool = False
    detail: dict[str, Any] = field(default_factory=dict)

    @property
    def holds(self) -> bool:
        return self.found >= self.limit if self.more_is_better else self.found <= self.limit

    def record(self) -> dict[str, Any]:
        wanted = {"at_least" if self.more_is_better else "at_most": self.limit}
        return {"name": self.name, "found": self.found, **wanted, "holds": self.holds, "detail": self.detail}

    def __str__(self) -> str:
        sign = ">=" if self.more_is_better else "<="
        return f"  {'ok ' if self.holds else 'NOT'} {self.name:<62} {self.found:8.3g}   {sign} {self.limit:g}"


class Runs:
    """Runs by their work and overrides; each is made once."""

    def __init__(self, folder: Path, steps: int) -> None:
        self.folder, self.steps = folder, steps
        self.made: dict[tuple[Any, ...], Any] = {}

    def metrics(self, work: Work, *overrides: str) -> list[dict[str, Any]]:
        made: list[dict[str, Any]] = self._once(
            ("run", work, overrides), lambda at: ours.train(work, self.steps, at, overrides)
        )
        return made

    def times(self, work: Work, *overrides: str) -> dict[str, dict[str, float]]:
        """Of each part of a step, and of the whole: median, min, max and count."""
        return spreads(self.metrics(work, *overrides))

    def bare(self, parts: Sequence[str], work: Work, *overrides: str) -> dict[str, list[float]]:
        """Seconds of steps of the engines side by side."""
        made: dict[str, list[float]] = self._once(
            (" and ".join(parts), work, overrides), lambda at: ours.bare(parts, work, self.steps, at, overrides)
        )
        return made

    def limits(self, work: Work, *overrides: str) -> dict[str, float]:
        made: dict[str, float] = self._once(("limits", work, overrides), lambda at: ours.limits(work, at, overrides))
        return made

    def _once(self, what: tuple[Any, ...], make: Callable[[Path], Any]) -> Any:
        if what not in self.made:
            print(f"    {what[0]} {what[1]} {' '.join(what[2])}", flush=True)
            self.made[what] = make(self.folder / f"own_{len(self.made)}")
        return self.made[what]


def rows(runs: Runs) -> list[Line]:
    """The learner against rows of their own for each answer: transformers' model on them, and this learner on them."""
    found = []
    for cells, limit in ((2, 1.0), (12, 3.5), (24, 6.0)):
        work = replace(USUAL, cells=cells)
        shared = spread(runs.bare(["learn"], work)["learn"])
        padded = spread(runs.bare(["learn_padded"], work)["learn_padded"])
        single = spread(runs.bare(["learn"], work, "learner.shared_prefix=false")["learn"])
        detail: dict[str, Any] = {"shared_s": shared, "padded_s": padded, "single_s": single}
        detail["this learner on single rows / on shared rows"] = single["median"] / shared["median"]
        name = f"learner: times as fast as padded rows, {work.image_tokens} image tokens"
        times = padded["median"] / shared["median"]
        found.append(Line(name=name, found=times, limit=limit, more_is_better=True, detail=detail))
    return found


def loop(runs: Runs) -> list[Line]:
    """What Ray, scoring and pushing add to the engines alone: first one after the other, then side by side.

    What counts is the median of the turns' ratios: a slow spell of the machine is one turn's alone.
    """

    def bare(part: str, *overrides: str) -> Program:
        beside = "_beside" if overrides else ""
        return ours.bare_training(part, USUAL, runs.folder / f"{part}{beside}.txt", overrides)

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
        _ratio("overlapped step / the longer of both side by side, a core each", 1.15, overlapped, max),
    ]


def _in_turn(steps: int, *sides: Mapping[str, Program]) -> list[dict[str, list[float]]]:
    print(f"    in turn: {', '.join(' and '.join(side) for side in sides)}", flush=True)
    return in_turn(sides, _TURNS, steps)


def _ratio(
    name: str, limit: float, turns: Sequence[dict[str, list[float]]], of_parts: Callable[[list[float]], float]
) -> Line:
    """Of the medians within each turn."""
    middles = [{part: median(own) for part, own in turn.items()} for turn in turns]
    ratios = [turn["step_s"] / of_parts([turn["generate"], turn["learn"]]) for turn in middles]
    detail: dict[str, Any] = {part: spread([one for turn in turns for one in turn[part]]) for part in turns[0]}
    return Line(name=name, found=median(ratios), limit=limit, detail=detail | {"turns": ratios})


def limits(runs: Runs) -> list[Line]:
    """How much of the machine's rate of products each side makes; what is missing is all that is no product."""
    return [
        line for cells in (4, 12, 24) for line in _shares(runs, replace(USUAL, cells=cells), learn=0.0, generate=0.0)
    ]


def pretrained(runs: Runs) -> list[Line]:
    """The same of a language model with a real vocabulary, in whose steps products count for more.

    And beside the products of each side replayed alone, at their own shapes: sampling multiplies few rows at a time by
    all weights, and reading these, the cores fall behind their best rate.
    """
    work = replace(USUAL, cells=8, model="smol")
    beside = [_beside_products(runs, work, part, limit) for part, limit in (("learn", 1 / 0.75), ("generate", 1.5))]
    return [*_shares(runs, work, learn=0.0, generate=0.0), *beside]


def _beside_products(runs: Runs, work: Work, part: str, limit: float) -> Line:
    whole, products = (spread(runs.bare([one], work)[one]) for one in (part, f"{part}_products"))
    name = f"{part}: times as long as its products alone, {work}"
    detail = {"s": whole, "products_s": products}
    return Line(name=name, found=whole["median"] / products["median"], limit=limit, detail=detail)


def _shares(runs: Runs, work: Work, **wanted: float) -> list[Line]:
    """Sampling is at the least a forward pass, which is what a step with a reference has more than one without."""
    whole, without = runs.limits(work), runs.limits(work, "algo.kl.beta_min=0", "algo.kl.beta_max=0")
    operations = {"learn": whole["operations"], "generate": whole["operations"] - without["operations"]}
    found = []
    for part, limit in wanted.items():
        took = spread(runs.bare([part], work)[part])
        share = operations[part] / whole["a_second"] / took["median"]
        detail = {"gflop": operations[part] / 1e9, "gflop_a_second": whole["a_second"] / 1e9, "s": took}
        name = f"{part}: share of the time that its products need at least, {work}"
        found.append(Line(name=name, found=share, limit=limit, more_is_better=True, detail=detail))
    return found


def push(runs: Runs) -> list[Line]:
    times = runs.times(replace(USUAL, cells=8))
    step = times["step_s"]["median"]
    return [
        Line(name="push and audit / step, 64 image tokens", found=times["push_s"]["median"] / step, limit=0.05),
        Line(name="scoring / step, 64 image tokens", found=times["score_s"]["median"] / step, limit=0.02),
    ]


def cost(runs: Runs) -> list[Line]:
    """By prompts, answer tokens and image tokens; a run's fixed cost makes the first two smaller than 1."""

    def seconds(work: Work) -> float:
        times = runs.times(work)
        return times["generate_s"]["median"] + times["update_s"]["median"]

    prompts = [seconds(replace(USUAL, prompts=count)) for count in (4, 8, 16)]
    tokens = [seconds(replace(USUAL, tokens=count)) for count in (32, 64, 128)]
    images = [seconds(replace(USUAL, answers=16, cells=cells)) for cells in (4, 12)]
    return [
        Line(name="4 times the prompts / 4", found=prompts[2] / prompts[0] / 4, limit=1.1, detail={"s": prompts}),
        Line(name="4 times the answer tokens / 4", found=tokens[2] / tokens[0] / 4, limit=1.1, detail={"s": tokens}),
        Line(name="144 image tokens / 16, 16 answers", found=images[1] / images[0], limit=1.6, detail={"s": images}),
    ]


def ranks(runs: Runs) -> list[Line]:
    """The cores are the same: two processes of one thread against one of two."""
    one, learners, actors = (
        runs.times(USUAL, *more) for more in ((), ("learner.world_size=2",), ("rollout.num_actors=2",))
    )
    return [
        Line(
            name=f"{name}: times as fast as one",
            found=one[part]["median"] / two[part]["median"],
            limit=1.0,
            more_is_better=True,
            detail={"one": one[part], "two": two[part]},
        )
        for name, part, two in (("2 learner ranks", "update_s", learners), ("2 rollout actors", "generate_s", actors))
    ]


def switches(runs: Runs) -> list[Line]:
    """Everything that makes a step fast, off: the same losses and KLs."""

    def curve(*overrides: str) -> list[float]:
        return [line[key] for line in runs.metrics(USUAL, *overrides) for key in ("loss", "kl/mean")]

    found = []
    for switch, others in {**dict.fromkeys(SWITCHES, ()), "train.prepare_ahead=false": ("train.overlap=true",)}.items():
        on, off = curve(*others), curve(*others, switch)
        distance = max(abs(mine - other) for mine, other in zip(on, off, strict=True))
        found.append(Line(name=f"loss and KL with {switch}", found=distance, limit=_ALIKE, detail={"off": off}))
    return found


def memory(runs: Runs) -> list[Line]:
    """200 steps, saving as a run does: the driver in MB, and the process that grows most, from a quarter to the end.

    By then the learner has saved twice: what a checkpoint is copied to, it keeps for the next one.
    """
    samples: list[tuple[float, dict[str, float]]] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(2.0):
            samples.append((time.time(), _resident()))

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        steps = ours.train(replace(USUAL, tokens=16), 200, runs.folder / "memory", ("train.checkpoint_every=25",))
    finally:
        over.set()
        watching.join()
    quarter_s, end_s = (steps[place]["time/unix_s"] for place in (len(steps) // 4, -1))
    there = [resident for at_s, resident in samples if quarter_s <= at_s <= end_s]
    early, late = there[0], there[-1]
    growth = {name: late[name] - mb for name, mb in early.items() if name in late}
    actors = {name: mb / early[name] for name, mb in growth.items() if name != "driver"}
    detail = {"early_mb": early, "late_mb": late}
    return [
        Line(name="driver's growth over 200 steps, MB", found=growth["driver"], limit=100, detail=detail),
        Line(name="largest growth of an actor over 200 steps, share", found=max(actors.values()), limit=0.05),
    ]


def _resident() -> dict[str, float]:
    """MB of the driver and of each actor below this process."""
    found: dict[str, float] = {}
    for process in psutil.Process().children(recursive=True):
        try:
            line, mb = " ".join(process.cmdline()), process.memory_info().rss / 2**20
        except psutil.Error:
            continue
        role = next((role for role in ("Learner", "Rollout", "Reward") if f"ray::{role}" in line), None)
        if "othink_ray.main" in line:
            found["driver"] = mb
        elif role:
            found[f"{role.lower()} {process.pid}"] = mb
    return found


def start(runs: Runs) -> list[Line]:
    """From the command to the end of the first step of the demo; the first time its base model may have to be made."""
    for folder in (runs.folder / "first_start", runs.folder / "start"):
        command = ["-m", "othink_ray.main", f"run.dir={folder}", "train.steps=1", "eval.every=0", "eval.questions=1"]
        begun = time.time()
        ours.run([sys.executable, *command], folder.with_suffix(".txt"))
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    took = next(line["time/unix_s"] for line in lines if "time/step_s" in line) - begun
    return [Line(name="start of the demo to the end of its first step, s", found=took, limit=25.0)]


LINES: dict[str, Callable[[Runs], Sequence[Line]]] = {
    function.__name__: function
    for function in (rows, loop, limits, pretrained, push, cost, ranks, switches, memory, start)
}
