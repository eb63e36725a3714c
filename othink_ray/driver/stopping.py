"""Signals that end a run: at once with a clean shutdown, or after the current step is finished and saved."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_JOIN_S = 0.1
_REPEATED_WITHIN_S = 2.0  # one request may arrive twice: Ray signals all processes of a job, a study its runs


class Stopped(Exception):
    """The run stopped on request, after saving its state."""


class StopRequest:
    """A request to stop after the current step."""

    since_s: float | None = None  # time.monotonic() of the request

    @property
    def made(self) -> bool:
        return self.since_s is not None


_interrupts: list[int] = []  # signals that interrupted this process
_request = StopRequest()


@contextmanager
def interruptible() -> Iterator[None]:
    """Raise KeyboardInterrupt on SIGINT, SIGTERM and SIGHUP inside the block; under `nohup` SIGHUP stays ignored."""
    _interrupts.clear()
    _request.since_s = None
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, interrupt) for number in numbers}
    hook, sys.unraisablehook = sys.unraisablehook, _ignore_lost_interrupt
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, handler)


def _ignore_lost_interrupt(unraisable: sys.UnraisableHookArgs) -> None:
    """Print an exception that Python drops, such as one in a destructor, unless it is a recorded interrupt."""
    if not (interrupted() and isinstance(unraisable.exc_value, KeyboardInterrupt)):
        sys.__unraisablehook__(unraisable)


def interrupt(number: int, frame: FrameType | None) -> None:
    """Handle a signal: record it and raise KeyboardInterrupt."""
    _interrupts.append(number)
    raise KeyboardInterrupt


def interrupted() -> bool:
    """Return whether a signal interrupted this process, even if its KeyboardInterrupt was lost.

    Python drops the exception in destructors and callbacks, and libraries may raise another one instead.
    """
    return bool(_interrupts)


def raise_if_interrupted() -> None:
    if interrupted():
        raise KeyboardInterrupt


def join_unless_interrupted(thread: threading.Thread) -> None:
    """Wait until the thread ends; raise KeyboardInterrupt after a signal, even if its own exception was lost."""
    while thread.is_alive():
        raise_if_interrupted()
        thread.join(_JOIN_S)


def stop_requested() -> bool:
    """Return whether the run is to stop, after the current step (SIGTERM) or at once (interrupt)."""
    return interrupted() or _request.made


def interrupted_status() -> int:
    """Return the exit status after an interrupt, 128 + the signal number: 143 for SIGTERM, else 130."""
    return 128 + (signal.SIGTERM if signal.SIGTERM in _interrupts else signal.SIGINT)


@contextmanager
def finishing_steps(log: Callable[[str], None]) -> Iterator[StopRequest]:
    """In the block, the first SIGTERM requests a stop after the step; a second one, and Ctrl-C, interrupt at once."""
    raise_if_interrupted()
    if threading.current_thread() is not threading.main_thread():
        yield _request
        return

    def handle(number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if _request.since_s is None:
            _request.since_s = now
            log("SIGTERM: stopping after this step is finished and saved; send SIGTERM again to stop at once")
        elif now - _request.since_s > _REPEATED_WITHIN_S:
            interrupt(number, frame)

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield _request
    finally:
        signal.signal(signal.SIGTERM, before)
