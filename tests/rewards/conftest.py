"""Shared fixtures of the reward tests: one session-wide grader with its real grading process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from othink_ray.config.schema import RewardConfig
from othink_ray.rewards import Grader

REWARD = RewardConfig(
    accuracy_weight=1.0,
    format_weight=1.0,
    custom=None,
    custom_weight=1.0,
    actors=1,
    without_tag="strict",
    answer_cpu_s=2.0,
    memory_mb=1024,
    timeout_s=60.0,
    actor_memory_mb=2048,
)


@pytest.fixture(scope="session")
def grader() -> Iterator[Grader]:
    with Grader(REWARD) as grader:
        yield grader


def live_processes(session: int) -> list[int]:
    """Return the pids of a session's processes that are still running."""
    pids = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, process_session = stat.read_text().rpartition(")")[2].split()[:4]
        except OSError:  # the process ended during the scan
            continue
        if int(process_session) == session and state not in "ZX":
            pids.append(int(stat.parent.name))
    return pids
