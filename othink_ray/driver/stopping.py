"""Signals that end a run: in good order at once, or after its step is finished and saved."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_REPEATED_WITHIN_S = 2.0  # Ray signals all processes of a job, and a study its runs: that is one request


class Stopped(Exception):
    """The run was requested to end, and has saved what it has."""


class StopRequest:
    """A request to end after the present step."""

    since_s: float | None = None

    @property
    def made(self) -> bool:
        return self.since_s is not None


_interrupts: list[int] = []  # signals that interrupted this process
_request = StopRequest()


@contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C, `kill` and a closed terminal raise KeyboardInterrupt in it; under `nohup` it outlives the terminal."""
    _interrupts.clear()
    _request.since_s = None
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def interrupt(number: int, frame: FrameType | None) -> None:
    """Handle a signal: record it and raise KeyboardInterrupt."""
    _interrupts.append(number)
    raise KeyboardInterrupt


def interrupted() -> bool:
    """Whether a signal interrupted this process, whatever became of the KeyboardInterrupt.

    Python drops it in a destructor or a callback, and libraries raise other exceptions instead.
    """
    return bool(_interrupts)


def raise_if_interrupted() -> None:
    if interrupted():
        raise KeyboardInterrupt


def stop_requested() -> bool:
    """Whether a SIGTERM asks the run to end after its step, or an interrupt at once."""
    return interrupted() or _request.made


def interrupted_status() -> int:
    """The exit status after an interrupt: that of a process that SIGTERM or SIGINT ended."""
    return 128 + (signal.SIGTERM if signal.SIGTERM in _interrupts else signal.SIGINT)


@contextmanager
def finishing_steps(tell: Callable[[str], None]) -> Iterator[StopRequest]:
    """While steps are made, the first SIGTERM is a request; a later one, and Ctrl-C, interrupt at once."""
    raise_if_interrupted()
    if threading.current_thread() is not threading.main_thread():
        yield _request
        return

    def handle(number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if _request.since_s is None:
            _request.since_s = now
            tell("asked to end: this step is finished and saved first; ask again to end at once")
        elif now - _request.since_s > _REPEATED_WITHIN_S:
            interrupt(number, frame)

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield _request
    finally:
        signal.signal(signal.SIGTERM, before)
