"""A polite end: what asks a run to go (Slurm, a spot machine, `kill`) lets it finish its step and save first."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Stopped(Exception):
    """The run was asked to end, and has saved what it has."""


_asked: list[int] = []  # signals that interrupted this process


@contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C, `kill` and a closed terminal raise KeyboardInterrupt in it; under `nohup` it outlives the terminal."""
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, answer in before.items():
            signal.signal(number, answer)


def interrupt(number: int, frame: FrameType | None) -> None:
    """The handler of these signals."""
    _asked.append(number)
    raise KeyboardInterrupt


def interrupted() -> bool:
    """Whether a signal came, whatever became of what its handler raised.

    Python drops it in a destructor or a callback, and libraries make other exceptions of it.
    """
    return bool(_asked)


def raise_if_interrupted() -> None:
    if interrupted():
        raise KeyboardInterrupt


def interrupted_status() -> int:
    """The exit status after an interrupt: that of a process that SIGTERM or SIGINT ended."""
    return 128 + (signal.SIGTERM if signal.SIGTERM in _asked else signal.SIGINT)


class StopRequest:
    """Whether somebody has asked."""

    made = False


@contextmanager
def finishing_steps(tell: Callable[[str], None]) -> Iterator[StopRequest]:
    """While steps are made, the first SIGTERM is a request; the second one, and Ctrl-C, interrupt at once."""
    request = StopRequest()
    raise_if_interrupted()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = signal.getsignal(signal.SIGTERM)

    def asked(number: int, frame: FrameType | None) -> None:
        if request.made:
            interrupt(number, frame)
        request.made = True
        tell("asked to end: this step is finished and saved first; ask again to end at once")

    signal.signal(signal.SIGTERM, asked)
    try:
        yield request
    finally:
        signal.signal(signal.SIGTERM, before)
