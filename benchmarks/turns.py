"""Programs that are all up and work in turn, a few steps each: a slow spell of the machine meets every one of them."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import psutil

from benchmarks.times import WARM_UP
from othink_ray.study.launch import end

_LOOK_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Timed:
    """One step of a program; `began` is time.time()."""

    began: float
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """A process with all that it starts; `said` is what it has told of its steps."""

    process: subprocess.Popen[bytes]
    said: Callable[[], Sequence[Timed]]
    require: Callable[[], None]  # raises where it has failed

    def signal(self, what: signal.Signals) -> None:
        """To each of its processes."""
        try:
            own = psutil.Process(self.process.pid)
            everyone = [own, *own.children(recursive=True)]
        except psutil.NoSuchProcess:
            return
        for one in everyone:
            try:
                one.send_signal(what)
            except psutil.NoSuchProcess:
                continue


def in_turn(sides: Sequence[Mapping[str, Program]], turns: int, steps: int) -> list[dict[str, list[float]]]:
    """Of each turn the seconds of the steps, at least so many, of each program; those of one side work together.

    All are warm before the first turn. A step that was stopped on its way counts nowhere.
    """
    programs = {name: program for side in sides for name, program in side.items()}
    with ended(list(programs.values())):
        while any(len(program.said()) <= WARM_UP for program in programs.values()):
            _wait(programs)
        for program in programs.values():
            program.signal(signal.SIGSTOP)
        windows: list[dict[str, tuple[float, float]]] = []
        for _ in range(turns):
            windows.append({})
            for side in sides:
                windows[-1] |= dict.fromkeys(side, _turn(side, steps))
        return [
            {name: _within(programs[name].said(), *window) for name, window in of_all.items()} for of_all in windows
        ]


def _turn(side: Mapping[str, Program], steps: int) -> tuple[float, float]:
    """When it began and ended."""
    for program in side.values():
        program.signal(signal.SIGCONT)
    began = time.time()
    ended = began
    while any(len(_within(program.said(), began, ended)) < steps for program in side.values()):
        _wait(side)
        ended = time.time()
    for program in side.values():
        program.signal(signal.SIGSTOP)
    return began, ended


def _wait(programs: Mapping[str, Program]) -> None:
    time.sleep(_LOOK_S)
    for program in programs.values():
        program.require()


def _within(steps: Sequence[Timed], began: float, ended: float) -> list[float]:
    return [step.seconds for step in steps if began <= step.began and step.began + step.seconds <= ended]


@contextmanager
def ended(programs: Sequence[Program]) -> Iterator[None]:
    """Whatever happens, none of them is left, stopped or not."""
    try:
        yield
    finally:
        for program in programs:
            program.signal(signal.SIGCONT)
        end([program.process for program in programs])
