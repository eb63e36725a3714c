"""Programs kept running and resumed in turn, a few steps each, so that a slow phase of the machine affects all."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import psutil

from benchmarks.times import WARM_UP
from othink_ray.study.launch import stop_processes

_POLL_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedStep:
    """One step of a program; `began` is time.time()."""

    began: float
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """A process with its descendants; `steps` returns the steps finished so far."""

    process: subprocess.Popen[bytes]
    steps: Callable[[], Sequence[TimedStep]]
    require_running: Callable[[], None]  # raises if the process has failed

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process and all its descendants."""
        try:
            root = psutil.Process(self.process.pid)
            processes = [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return
        for process in processes:
            try:
                process.send_signal(number)
            except psutil.NoSuchProcess:
                continue


def in_turn(sides: Sequence[Mapping[str, Program]], turns: int, steps: int) -> list[dict[str, list[float]]]:
    """Return for each turn the seconds of at least `steps` steps of each program; programs of one side run together.

    All are warm before the first turn. A step that is suspended midway is not counted.
    """
    programs = {name: program for side in sides for name, program in side.items()}
    with terminating(list(programs.values())):
        while any(len(program.steps()) <= WARM_UP for program in programs.values()):
            _wait(programs)
        for program in programs.values():
            program.signal(signal.SIGSTOP)
        windows: list[dict[str, tuple[float, float]]] = []
        for _ in range(turns):
            windows.append({})
            for side in sides:
                windows[-1] |= dict.fromkeys(side, _turn(side, steps))
        return [{name: _within(programs[name].steps(), *window) for name, window in turn.items()} for turn in windows]


def _turn(side: Mapping[str, Program], steps: int) -> tuple[float, float]:
    """Resume a side until each program has done `steps` steps; return when the turn began and ended."""
    for program in side.values():
        program.signal(signal.SIGCONT)
    began = time.time()
    ended = began
    while any(len(_within(program.steps(), began, ended)) < steps for program in side.values()):
        _wait(side)
        ended = time.time()
    for program in side.values():
        program.signal(signal.SIGSTOP)
    return began, ended


def _wait(programs: Mapping[str, Program]) -> None:
    time.sleep(_POLL_S)
    for program in programs.values():
        program.require_running()


def _within(steps: Sequence[TimedStep], began: float, ended: float) -> list[float]:
    return [step.seconds for step in steps if began <= step.began and step.began + step.seconds <= ended]


@contextmanager
def terminating(programs: Sequence[Program]) -> Iterator[None]:
    """Terminate all programs on exit, suspended ones included."""
    try:
        yield
    finally:
        for program in programs:
            program.signal(signal.SIGCONT)
        stop_processes([program.process for program in programs])
