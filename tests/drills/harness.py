"""Harness of the drills: starts small runs and compares each, step by step, with an undisturbed baseline run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from tests.drills.faults import lines

SMALL = (
    *("model.tiny.warm_steps=40", "model.tiny.warm_lr=2e-3", "model.tiny.warm_batch=16", "eval.questions=16"),
    *("train.prompts_per_step=4", "train.checkpoint_every=1", "algo.group_size=4"),
    *("eval.every=0", "rollout.step_timeout_s=15", "learner.step_timeout_s=15", "algo.reward.timeout_s=5"),
    *("algo.reward.answer_cpu_s=0.5", "faults.max_restarts=1000"),
    *("rollout.load_timeout_s=90", "learner.load_timeout_s=90"),
    *("rollout.threads=1", "learner.threads=1"),
)
EXACT = ("reward/mean", "kl/beta", "loss", "tokens/completion_mean", "groups/constant_frac")
APART = 6  # steps from one fault to the next, some of which pass before its random moment
RECOVERY_STEPS = 2  # steps after a fault, the first of which began before the recovery


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Cost of a fault; `wrong` is empty if its run equals the baseline at every step."""

    fault: str
    number: int
    noticed_after_s: float
    recovered_after_s: float
    steps_lost: int
    samples_masked: int
    wrong: str


class Harness:
    """One base model and one undisturbed baseline run, long enough for all faults of a drill."""

    def __init__(self, folder: Path, times: int, seed: int) -> None:
        self.folder, self.baseline, self.times, self.seed = folder, folder / "baseline", times, seed
        self.steps = APART * times + 12  # the run must go on for a while after the last fault
        assert self.finish(self.start(self.baseline)) == 0, self.screen(self.baseline).read_text()

    def screen(self, run_dir: Path) -> Path:
        """Return the file of the run's output; not in its folder, whose disk may be full."""
        return self.folder / f"{run_dir.name}.txt"

    def start(
        self,
        run_dir: Path,
        *overrides: str,
        before: Sequence[str] = (),
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> subprocess.Popen[bytes]:
        self.folder.mkdir(parents=True, exist_ok=True)
        settings = (f"run.dir={run_dir}", f"run.cache_dir={self.folder / 'cache'}", f"train.steps={self.steps}")
        with self.screen(run_dir).open("ab") as screen:
            return subprocess.Popen(
                [*before, sys.executable, "-m", "othink_ray.main", *SMALL, *settings, *overrides],
                stdout=screen,
                stderr=subprocess.STDOUT,
                env=os.environ | environment | {"CI": "true"},
                start_new_session=True,
            )

    @staticmethod
    def finish(run: subprocess.Popen[bytes]) -> int:
        try:
            return run.wait(3600)
        finally:
            if run.poll() is None:
                os.killpg(run.pid, signal.SIGKILL)

    def differences(self, run_dir: Path, baseline: Path) -> str:
        """Return the first difference from the baseline, or ""; after masked answers only step numbers are compared."""
        found, expected = lines(run_dir), lines(baseline)
        if [line["step"] for line in found] != [line["step"] for line in expected]:
            return f"steps {[line['step'] for line in found]}"
        if any(line["faults/masked_answers"] for line in found):
            return ""
        for one, other in zip(found, expected, strict=True):
            for name in EXACT:
                if one[name] != other[name]:
                    return f"step {one['step']}: {name} is {one[name]}, in the baseline {other[name]}"
        return ""

    def outcomes(
        self,
        run_dir: Path,
        fault: str,
        fault_times: Sequence[float],
        status: int,
        noticed_at: Sequence[float],
        *,
        baseline: Path | None = None,
        times: int | None = None,
    ) -> list[Outcome]:
        """Return the outcome of each fault of a run, from its records and the times at which it was noticed."""
        wrong = f"ended with {status}, see {self.screen(run_dir)}" if status else ""
        wrong = wrong or self.differences(run_dir, baseline or self.baseline)
        wrong = wrong or (
            "" if len(fault_times) == (times or self.times) else f"{len(fault_times)} faults were injected"
        )
        done, again = lines(run_dir), records(run_dir, "metrics.discarded")
        found, before = [], 0.0
        for number, fault_time in enumerate(fault_times):
            noticed = min((when for when in noticed_at if when > fault_time), default=fault_time)
            recovered = min((one["time/unix_s"] for one in done if one["time/unix_s"] > noticed), default=float("nan"))
            found.append(
                Outcome(
                    fault=fault,
                    number=number,
                    noticed_after_s=noticed - fault_time,
                    recovered_after_s=recovered - fault_time,
                    steps_lost=sum(before < one["time/unix_s"] <= recovered for one in again),
                    samples_masked=int(
                        sum(one["faults/masked_answers"] for one in done if before < one["time/unix_s"] <= recovered)
                    ),
                    wrong=wrong,
                )
            )
            before = recovered
        return found


def incident_times(run_dir: Path) -> list[float]:
    """Return the Unix times of the run's incidents."""
    return [incident["unix_s"] for incident in records(run_dir, "incidents")]


def records(run_dir: Path, name: str) -> list[dict[str, float]]:
    file = run_dir / f"{name}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
