"""What each process of a run holds in memory while it goes on, by its role, as the kernel counts it."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

ROLES = {"RolloutActor": "engine", "LearnerActor": "learner", "RewardActor": "reward"}
OTHERS = "Ray itself"
TOGETHER = "together"
_LOOK_S = 0.3


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """All processes at one time. A page that several share counts in each as its share."""

    unix_s: float
    held: dict[str, int]  # bytes by role


class Watch:
    """Looks at a driver and all its descendants every 0.3 s: a peak that is shorter may be missed."""

    def __init__(self) -> None:
        self.looks: list[Look] = []
        self._over = threading.Event()

    @contextmanager
    def of(self, driver: int) -> Iterator[None]:
        thread = threading.Thread(target=self._watch, args=(driver,), name="watch", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            thread.join()

    def peaks(self, start_s: float, end_s: float) -> dict[str, int]:
        """Bytes of each role at its own peak between two times, and of all together at their fullest."""
        within = [look.held for look in self.looks if start_s <= look.unix_s <= end_s]
        roles = sorted({role for held in within for role in held})
        found = {role: max(held.get(role, 0) for held in within) for role in roles}
        return found | {TOGETHER: max((sum(held.values()) for held in within), default=0)}

    def _watch(self, driver: int) -> None:
        while not self._over.wait(_LOOK_S):
            held: dict[str, int] = defaultdict(int)
            for role, pid in _processes(driver):
                held[role] += _proportional(pid)
            self.looks.append(Look(unix_s=time.time(), held=dict(held)))


def _processes(driver: int) -> Iterator[tuple[str, int]]:
    try:
        below = psutil.Process(driver).children(recursive=True)
    except psutil.NoSuchProcess:
        return
    yield "driver", driver
    for one in below:
        title = _title(one)
        yield next((role for actor, role in ROLES.items() if actor in title), OTHERS), one.pid


def _title(process: psutil.Process) -> str:
    """Ray names its workers by actor and method."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _proportional(pid: int) -> int:
    """Bytes; 0 of a process that has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)
