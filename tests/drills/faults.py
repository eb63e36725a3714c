"""Fault injection from outside: the processes of a run by role, and signals to them."""

from __future__ import annotations

import json
import random
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

ROLES = {"rollout": "ray::RolloutActor", "learner": "ray::LearnerActor", "reward": "ray::RewardActor"}


@dataclass(frozen=True, slots=True)
class Fault:
    """A signal to a process of a role: SIGKILL for a death, SIGSTOP for a hang."""

    role: str
    how: signal.Signals
    after_steps: int

    def __str__(self) -> str:
        return f"{'hang' if self.how == signal.SIGSTOP else 'kill -9'} of a {self.role} process"


def processes_of(role: str, driver: psutil.Process) -> list[psutil.Process]:
    """Return the descendants of the driver with this role."""
    found = []
    for process in driver.children(recursive=True):
        try:
            if " ".join(process.cmdline()).startswith(ROLES[role]):
                found.append(process)
        except psutil.Error:
            continue
    return found


def steps_done(run_dir: Path) -> int:
    metrics = run_dir / "metrics.jsonl"
    return metrics.read_text().count("\n") if metrics.is_file() else 0


def lines(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@dataclass
class Saboteur:
    """Injects faults in turn, each a random moment after its step and at least `apart` steps after the last."""

    driver: psutil.Process
    run_dir: Path
    faults: Sequence[Fault]
    seed: int
    within_s: float = 1.0
    apart: int = 0
    done: list[tuple[Fault, float]] = field(default_factory=list)  # with the time of injection

    def __enter__(self) -> Saboteur:
        self.others = {process.pid for role in ROLES for process in processes_of(role, self.driver)}  # of other runs
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._work)
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.over.set()
        self.thread.join()

    def _work(self) -> None:
        dice, due = random.Random(self.seed), 0
        for fault in self.faults:
            while steps_done(self.run_dir) < max(fault.after_steps, due) and not self.over.wait(0.02):
                pass
            self.over.wait(dice.uniform(0.0, self.within_s))
            while not self.over.is_set():
                victims = [it for it in processes_of(fault.role, self.driver) if it.pid not in self.others]
                if victims:
                    self.done.append((fault, time.time()))
                    due = steps_done(self.run_dir) + self.apart
                    dice.choice(victims).send_signal(fault.how)
                    break
                time.sleep(0.05)
