"""A polite end: what asks a run to go (Slurm, a spot machine, `kill`) lets it finish its step and save first."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Stopped(Exception):
    """The run was asked to end, and has saved what it has."""


_terminated = threading.Event()


@contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C, `kill` and a closed terminal raise KeyboardInterrupt in it; under `nohup` it outlives the terminal."""
    answers = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: terminate}
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        answers[signal.SIGHUP] = signal.default_int_handler
    before = {number: signal.signal(number, answer) for number, answer in answers.items()}
    try:
        yield
    finally:
        for number, answer in before.items():
            signal.signal(number, answer)


def terminate(number: int, frame: FrameType | None) -> None:
    """A handler of SIGTERM where no step can be finished first: it ends the run in good order, as Ctrl-C does."""
    _terminated.set()  # Ray makes an interrupt of its own from what is raised in its calls
    raise KeyboardInterrupt


def raise_if_terminated() -> None:
    """For work that goes on: Python drops what a signal handler raises in a destructor or in a callback."""
    if _terminated.is_set():
        raise KeyboardInterrupt


def interrupted_status() -> int:
    """The exit status after a KeyboardInterrupt: that of a process that SIGTERM or SIGINT ended."""
    return 128 + (signal.SIGTERM if _terminated.is_set() else signal.SIGINT)


class StopRequest:
    """Whether somebody has asked."""

    made = False


@contextmanager
def finishing_steps(tell: Callable[[str], None]) -> Iterator[StopRequest]:
    """While steps are made, the first SIGTERM is a request; the second one, and Ctrl-C, interrupt at once."""
    request = StopRequest()
    raise_if_terminated()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = signal.getsignal(signal.SIGTERM)

    def asked(number: int, frame: FrameType | None) -> None:
        if request.made:
            terminate(number, frame)
        request.made = True
        tell("asked to end: this step is finished and saved first; ask again to end at once")

    signal.signal(signal.SIGTERM, asked)
    try:
        yield request
    finally:
        signal.signal(signal.SIGTERM, before)
