"""A process that reports the end of a run whose driver cannot: it was killed, or Ray's C++ code has exited it."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path

import psutil

# What the driver writes: that it is at work, a line for each process that should end with it, and how it ended.
_ARMED = "+"  # without it the end of the pipe means nothing
_CLEAN_EXIT = "-"
_NO_REASON = "its process died without an error message (killed, perhaps out of memory, or Ray has ended on its node)"
_PATIENCE_S = 120.0
_GRACE_S = 5.0


class ExitReporter:
    """Runs from entry to exit. If the driver ends before the exit, it prints a line and writes the report.

    `write_report` is called in the other process, so it must be importable by its name.
    """

    def __init__(self, folder: Path, records_file: str, write_report: Callable[[Path], Path], remedy: str) -> None:
        self._arguments = [str(folder), records_file, write_report.__module__, write_report.__qualname__, remedy]

    def __enter__(self) -> ExitReporter:
        # A session of its own: Ctrl-C and a kill of the driver's group do not reach it.
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, *self._arguments], stdin=subprocess.PIPE, start_new_session=True
        )
        self._write(_ARMED)
        return self

    def __exit__(self, *error: object) -> None:
        self._write(_CLEAN_EXIT, last=True)
        self.wait()

    def end_with_driver(self, processes: Iterable[psutil.Process]) -> None:
        """Have it kill these if the driver ends before the exit and they are alive `_GRACE_S` later."""
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                self._write(f"{process.pid} {process.create_time()}\n")

    def report(self, reason: str) -> None:
        """Have it print this reason and write the report."""
        self._write(" ".join(reason.splitlines()), last=True)

    def wait(self) -> None:
        """Wait for the process to exit."""
        try:
            self._process.wait(_PATIENCE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def _write(self, text: str, *, last: bool = False) -> None:
        pipe = self._process.stdin
        assert pipe is not None
        with suppress(BrokenPipeError, ValueError):  # the process was killed, or the pipe is closed already
            pipe.write(text.encode())
            pipe.flush()
            if last:
                pipe.close()


def main(arguments: Sequence[str]) -> None:
    """Wait until the driver, or its end, closes the pipe; then report unless the exit was clean."""
    folder, records_file, module, function, remedy = arguments
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # it ends with the driver
    text = sys.stdin.read()
    *processes, reason = text.removeprefix(_ARMED).split("\n")
    if reason == _CLEAN_EXIT or not text.startswith(_ARMED):
        return
    if sys.stdout.isatty():
        _say("\x1b[?25h")  # the cursor, which a progress bar hides
    _say(f"stopped: {reason or _NO_REASON}; {remedy}\n")
    if (Path(folder) / records_file).is_file():
        write_report: Callable[[Path], Path] = getattr(import_module(module), function)
        try:
            _say(f"report of what was done: {write_report(Path(folder))}\n")
        except Exception as error:  # whatever was wrong with the files of a run that died
            _say(f"no report could be written: {error}\n")
    _end(processes)


def _end(listed: Sequence[str]) -> None:
    """Kill the listed processes, `<pid> <create time>` each, that do not end by themselves."""
    alive = []
    for pid, created in map(str.split, listed):
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(int(pid))
            if process.create_time() == float(created):  # else another process has the number now
                alive.append(process)
    for process in psutil.wait_procs(alive, timeout=_GRACE_S)[1]:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def _say(text: str) -> None:
    with suppress(OSError):  # the terminal may be gone too
        print(text, end="", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
