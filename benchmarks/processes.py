"""Memory of each process of a run over time, by role: proportional set size (PSS) as the kernel counts it."""

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
_POLL_S = 0.3


@dataclass(frozen=True, slots=True, kw_only=True)
class MemorySample:
    """Memory of all processes at one time; a shared page counts in each process in proportion."""

    unix_s: float
    held: dict[str, int]  # bytes by role


class MemoryMonitor:
    """Sample the memory of a driver and all its descendants every 0.3 s; shorter peaks may be missed."""

    def __init__(self) -> None:
        self.samples: list[MemorySample] = []
        self._done = threading.Event()

    @contextmanager
    def of(self, driver: int) -> Iterator[None]:
        """Sample in a thread while the context is open; `driver` is a process id."""
        thread = threading.Thread(target=self._watch, args=(driver,), name="memory monitor", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._done.set()
            thread.join()

    def peaks(self, start_s: float, end_s: float) -> dict[str, int]:
        """Return the peak bytes of each role between two times, and the peak of their sum."""
        within = [sample.held for sample in self.samples if start_s <= sample.unix_s <= end_s]
        roles = sorted({role for held in within for role in held})
        peaks = {role: max(held.get(role, 0) for held in within) for role in roles}
        return peaks | {TOGETHER: max((sum(held.values()) for held in within), default=0)}

    def _watch(self, driver: int) -> None:
        while not self._done.wait(_POLL_S):
            held: dict[str, int] = defaultdict(int)
            for role, pid in _processes(driver):
                held[role] += _proportional(pid)
            self.samples.append(MemorySample(unix_s=time.time(), held=dict(held)))


def _processes(driver: int) -> Iterator[tuple[str, int]]:
    """Yield (role, process id) of the driver and its descendants."""
    try:
        descendants = psutil.Process(driver).children(recursive=True)
    except psutil.NoSuchProcess:
        return
    yield "driver", driver
    for process in descendants:
        title = _title(process)
        yield next((role for actor, role in ROLES.items() if actor in title), OTHERS), process.pid


def _title(process: psutil.Process) -> str:
    """Return the command line, in which Ray puts actor and method; empty if the process has ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _proportional(pid: int) -> int:
    """Return the PSS in bytes; 0 if the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)
