"""Where drills take place: small runs, one that is left in peace, and others that are held against it step by step."""

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
APART = 6  # steps from one fault to the next, of which some go by before its random moment
MENDED = 2  # steps after a fault, of which one was begun when it was over


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a fault cost. `wrong` is empty where its run is, step by step, the one that was left in peace."""

    fault: str
    number: int
    noticed_after_s: float
    recovered_after_s: float
    steps_lost: int
    samples_masked: int
    wrong: str


class Ground:
    """Where the drills take place: one base model, and a run that was left in peace, long enough for all faults."""

    def __init__(self, folder: Path, times: int, seed: int) -> None:
        self.folder, self.peaceful, self.times, self.seed = folder, folder / "in_peace", times, seed
        self.steps = APART * times + 12  # after the last one the run must be at work for a while
        assert self.finish(self.start(self.peaceful)) == 0, self.screen(self.peaceful).read_text()

    def screen(self, run_dir: Path) -> Path:
        """Not in its folder, which may be on a disk that is full."""
        return self.folder / f"{run_dir.name}.txt"

    def start(
        self,
        run_dir: Path,
        *overrides: str,
        before: Sequence[str] = (),
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> subprocess.Popen[bytes]:
        self.folder.mkdir(parents=True, exist_ok=True)
        own = (f"run.dir={run_dir}", f"run.cache_dir={self.folder / 'cache'}", f"train.steps={self.steps}")
        with self.screen(run_dir).open("ab") as screen:
            return subprocess.Popen(
                [*before, sys.executable, "-m", "othink_ray.main", *SMALL, *own, *overrides],
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

    def differences(self, run_dir: Path, peaceful: Path) -> str:
        """From the run in peace; a masked answer changes what follows it: then only the steps are compared."""
        found, expected = lines(run_dir), lines(peaceful)
        if [line["step"] for line in found] != [line["step"] for line in expected]:
            return f"steps {[line['step'] for line in found]}"
        if any(line["faults/masked_answers"] for line in found):
            return ""
        for one, other in zip(found, expected, strict=True):
            for name in EXACT:
                if one[name] != other[name]:
                    return f"step {one['step']}: {name} is {one[name]}, in peace {other[name]}"
        return ""

    def outcomes(
        self,
        run_dir: Path,
        fault: str,
        deeds: Sequence[float],
        status: int,
        told: Sequence[float],
        *,
        peaceful: Path | None = None,
        times: int | None = None,
    ) -> list[Outcome]:
        """Of one run, after all that was done to it: each fault's part of what it wrote, and of when it told what."""
        wrong = f"ended with {status}, see {self.screen(run_dir)}" if status else ""
        wrong = wrong or self.differences(run_dir, peaceful or self.peaceful)
        wrong = wrong or ("" if len(deeds) == (times or self.times) else f"{len(deeds)} faults were done")
        done, again = lines(run_dir), written(run_dir, "metrics.discarded")
        found, before = [], 0.0
        for number, deed in enumerate(deeds):
            noticed = min((when for when in told if when > deed), default=deed)
            mended = min((one["time/unix_s"] for one in done if one["time/unix_s"] > noticed), default=float("nan"))
            found.append(
                Outcome(
                    fault=fault,
                    number=number,
                    noticed_after_s=noticed - deed,
                    recovered_after_s=mended - deed,
                    steps_lost=sum(before < one["time/unix_s"] <= mended for one in again),
                    samples_masked=int(
                        sum(one["faults/masked_answers"] for one in done if before < one["time/unix_s"] <= mended)
                    ),
                    wrong=wrong,
                )
            )
            before = mended
        return found


def told_by(run_dir: Path) -> list[float]:
    """When it told of something that went wrong."""
    return [one["unix_s"] for one in written(run_dir, "incidents")]


def written(run_dir: Path, name: str) -> list[dict[str, float]]:
    file = run_dir / f"{name}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
