"""A helper process that reports the end of a run whose driver cannot: killed, or exited by Ray's C++ code."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path

_ARMED = "+"  # the driver's first byte: if it is missing, a closed pipe is not reported
_CLEAN_EXIT = "+-"
_NO_REASON = "its process died without an error message (killed, perhaps out of memory, or Ray has ended on its node)"
_EXIT_TIMEOUT_S = 120.0


class ExitReporter:
    """Runs from entry to exit of the context; if the driver dies in between, it prints a line and writes the report.

    `write_report` is called in the helper process, so it must be importable by name.
    """

    def __init__(self, folder: Path, records_file: str, write_report: Callable[[Path], Path], remedy: str) -> None:
        self._arguments = [str(folder), records_file, write_report.__module__, write_report.__qualname__, remedy]

    def __enter__(self) -> ExitReporter:
        # In a new session, so that Ctrl-C and a kill of the driver's process group do not reach it.
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, *self._arguments], stdin=subprocess.PIPE, start_new_session=True
        )
        self._write(_ARMED)
        return self

    def __exit__(self, *error: object) -> None:
        self._write(_CLEAN_EXIT.removeprefix(_ARMED), last=True)
        self.wait()

    def report(self, reason: str) -> None:
        """Make the helper print this reason and write the report."""
        self._write(reason, last=True)

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
        signal.signal(number, signal.SIG_IGN)  # it exits after the driver
    text = sys.stdin.read()
    if text == _CLEAN_EXIT or not text.startswith(_ARMED):
        return
    if sys.stdout.isatty():
        _say("\x1b[?25h")  # show the cursor, which a progress bar hides
    _say(f"stopped: {text.removeprefix(_ARMED) or _NO_REASON}; {remedy}\n")
    if (Path(folder) / records_file).is_file():
        write_report: Callable[[Path], Path] = getattr(import_module(module), function)
        try:
            _say(f"partial report: {write_report(Path(folder))}\n")
        except Exception as error:  # the files of a run that died may be in any state
            _say(f"the report could not be written: {error}\n")


def _say(text: str) -> None:
    with suppress(OSError):  # the terminal may be closed
        print(text, end="", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
