"""A helper process that reports the end of a run whose driver cannot: killed, or exited by Ray's C++ code."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path

import psutil

# Messages of the driver: armed, one line for each process to end with it, and how it exited.
_ARMED = "+"  # the first byte: if it is missing, a closed pipe is not reported
_CLEAN_EXIT = "-"
_NO_REASON = "its process died without an error message (killed, perhaps out of memory, or Ray has ended on its node)"
_EXIT_TIMEOUT_S = 120.0
_GRACE_S = 5.0


class ExitReporter:
    """Runs the helper process during the context: if the driver dies, the helper prints why and writes the report.

    The helper imports `write_report` by name.
    """

    def __init__(self, folder: Path, records_file: str, write_report: Callable[[Path], Path], remedy: str) -> None:
        self._arguments = [str(folder), records_file, write_report.__module__, write_report.__qualname__, remedy]

    def __enter__(self) -> ExitReporter:
        # In a new session, so that Ctrl-C and a kill of the driver's process group do not reach the helper.
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, *self._arguments], stdin=subprocess.PIPE, start_new_session=True
        )
        self._write(_ARMED)
        return self

    def __exit__(self, *error: object) -> None:
        self._write(_CLEAN_EXIT, last=True)
        self.wait()

    def end_with_driver(self, processes: Iterable[psutil.Process]) -> None:
        """Make the helper kill these processes if the driver dies and they are still alive `_GRACE_S` later."""
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                self._write(f"{process.pid} {process.create_time()}\n")

    def report(self, reason: str) -> None:
        """Make the helper print this reason and write the report."""
        self._write(" ".join(reason.splitlines()), last=True)

    def wait(self) -> None:
        """Wait for the helper to exit."""
        try:
            self._process.wait(_EXIT_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def _write(self, text: str, *, last: bool = False) -> None:
        pipe = self._process.stdin
        assert pipe is not None
        with suppress(BrokenPipeError, ValueError):  # the helper was killed, or the pipe is already closed
            pipe.write(text.encode())
            pipe.flush()
            if last:
                pipe.close()


def main(arguments: Sequence[str]) -> None:
    """Wait until the driver closes the pipe or dies; then report unless the exit was clean."""
    folder, records_file, module, function, remedy = arguments
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the helper exits after the driver
    text = sys.stdin.read()
    *processes, reason = text.removeprefix(_ARMED).split("\n")
    if reason == _CLEAN_EXIT or not text.startswith(_ARMED):
        return
    if sys.stdout.isatty():
        _say("\x1b[?25h")  # show the cursor, which a progress bar hides
    _say(f"stopped: {reason or _NO_REASON}; {remedy}\n")
    if (Path(folder) / records_file).is_file():
        write_report: Callable[[Path], Path] = getattr(import_module(module), function)
        try:
            _say(f"partial report: {write_report(Path(folder))}\n")
        except Exception as error:  # the files of a run that died may be in any state
            _say(f"the report could not be written: {error}\n")
    _kill_survivors(processes)


def _kill_survivors(listed: Sequence[str]) -> None:
    """Kill the listed processes (`PID CREATE_TIME`) that are still alive after the grace period."""
    alive = []
    for pid, created in map(str.split, listed):
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(int(pid))
            if process.create_time() == float(created):  # otherwise the pid has been reused
                alive.append(process)
    for process in psutil.wait_procs(alive, timeout=_GRACE_S)[1]:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def _say(text: str) -> None:
    with suppress(OSError):  # the terminal may be closed
        print(text, end="", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
