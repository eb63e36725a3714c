"""Programs in turn: each alone while its side has the machine, none left behind."""

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
from benchmarks.turns import Program, Timed, in_turn

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
Make = Callable[..., Program]


@pytest.fixture
def stepping(tmp_path: Path) -> Iterator[Make]:
    """Makes programs of even steps, with a child each."""
    made: list[subprocess.Popen[bytes]] = []

    def make(seconds: float, fails_at: int = -1) -> Program:
        log = tmp_path / f"{len(made)}.txt"
        with log.open("wb") as screen:
            process = subprocess.Popen(
                [sys.executable, "-c", STEPS, str(seconds), str(fails_at)], stdout=screen, start_new_session=True
            )
        made.append(process)

        def said() -> list[Timed]:
            lines = map(json.loads, log.read_text().split("\n")[:-1])
            return [Timed(began=began, seconds=seconds) for began, seconds in lines]

        def require() -> None:
            if process.poll():
                raise BenchError(f"ended with {process.returncode}")

        return Program(process=process, said=said, require=require)

    yield make
    for process in made:
        assert process.poll() is not None
        for child in psutil.process_iter():
            assert child.ppid() != process.pid


def test_each_side_has_its_turns_alone(stepping: Make) -> None:
    quick, slow, third = stepping(0.05), stepping(0.2), stepping(0.1)
    found = in_turn([{"quick": quick}, {"slow": slow, "third": third}], turns=3, steps=4)
    assert [set(turn) for turn in found] == [{"quick", "slow", "third"}] * 3
    for turn in found:
        assert all(len(seconds) >= 4 for seconds in turn.values())
        assert max(turn["quick"]) < 0.2 <= min(turn["slow"])
    counted = sum(len(turn["quick"]) for turn in found)
    interrupted = [two.began - one.began for one, two in pairwise(quick.said()) if two.began - one.began > 0.5]
    assert len(interrupted) == 2  # between its turns
    assert counted < len(quick.said())


def test_a_program_that_fails_ends_the_others_too(stepping: Make) -> None:
    began = time.monotonic()
    with pytest.raises(BenchError, match="ended with 3"):
        in_turn([{"sound": stepping(0.05)}, {"broken": stepping(0.05, fails_at=30)}], turns=50, steps=10)
    assert time.monotonic() - began < 60
