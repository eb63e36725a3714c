"""Programs in turn: one side runs at a time, and none is left behind."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import psutil
import pytest

from benchmarks.ours import BenchError
from benchmarks.turns import Program, TimedStep, in_turn

STEPS = """
import json, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
for number in range(1000):
    began = time.time()
    time.sleep(float(sys.argv[1]))
    print(json.dumps([began, time.time() - began]), flush=True)
    if number == int(sys.argv[2]):
        sys.exit(3)
"""
MakeProgram = Callable[..., Program]


@pytest.fixture
def stepping(tmp_path: Path) -> Iterator[MakeProgram]:
    """Return a factory of programs with steps of equal length and a child process each."""
    started: list[subprocess.Popen[bytes]] = []

    def make(seconds: float, fails_at: int = -1) -> Program:
        log = tmp_path / f"{len(started)}.txt"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-c", STEPS, str(seconds), str(fails_at)], stdout=output, start_new_session=True
            )
        started.append(process)

        def steps() -> list[TimedStep]:
            lines = map(json.loads, log.read_text().split("\n")[:-1])
            return [TimedStep(began=began, seconds=seconds) for began, seconds in lines]

        def require_running() -> None:
            if process.poll():
                raise BenchError(f"exited with status {process.returncode}")

        return Program(process=process, steps=steps, require_running=require_running)

    yield make
    for process in started:
        assert process.poll() is not None
        for child in psutil.process_iter():
            assert child.ppid() != process.pid


def test_sides_run_alternately(stepping: MakeProgram) -> None:
    quick, slow, third = stepping(0.05), stepping(0.2), stepping(0.1)
    turns = in_turn([{"quick": quick}, {"slow": slow, "third": third}], turns=3, steps=4)
    assert [set(turn) for turn in turns] == [{"quick", "slow", "third"}] * 3
    for turn in turns:
        assert all(len(seconds) >= 4 for seconds in turn.values())
        assert max(turn["quick"]) < 0.2 <= min(turn["slow"])
    counted = sum(len(turn["quick"]) for turn in turns)
    gaps = [after.began - before.began for before, after in pairwise(quick.steps())]
    assert len([gap for gap in gaps if gap > 0.5]) == 2  # suspended between its three turns
    assert counted < len(quick.steps())


def test_a_failed_program_terminates_the_others(stepping: MakeProgram) -> None:
    began = time.monotonic()
    with pytest.raises(BenchError, match="exited with status 3"):
        in_turn([{"sound": stepping(0.05)}, {"broken": stepping(0.05, fails_at=30)}], turns=50, steps=10)
    assert time.monotonic() - began < 60
