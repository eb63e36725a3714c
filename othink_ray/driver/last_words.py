"""A process beside the driver that tells how a run ended where the driver cannot: killed, or exited by Ray itself."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path

_NOTHING = "-"
_UNKNOWN = (
    "the driver's process is gone without a word: killed, perhaps for want of memory, or because Ray has ended on its "
    "node; the same command with run.resume=auto goes on"
)


class LastWords:
    """Started on entry. When the driver ends before the exit, it prints a line and writes the report.

    `write_report` is called in the other process, so it must be importable by its name.
    """

    def __init__(self, run_dir: Path, made_of: str, write_report: Callable[[Path], Path]) -> None:
        self._of = [str(run_dir), made_of, write_report.__module__, write_report.__qualname__]

    def __enter__(self) -> LastWords:
        # A session of its own: Ctrl-C and a kill of the driver's group do not reach it.
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, *self._of], stdin=subprocess.PIPE, start_new_session=True
        )
        return self

    def __exit__(self, *error: object) -> None:
        self.tell(_NOTHING)
        self.wait()

    def tell(self, why: str) -> None:
        """Ask for the line with this reason, and for the report."""
        assert self._process.stdin is not None
        if not self._process.stdin.closed:
            with suppress(BrokenPipeError):  # somebody has killed it
                self._process.stdin.write(why.encode())
                self._process.stdin.close()

    def wait(self) -> None:
        """Until all is told and written."""
        self._process.wait()


def main(arguments: Sequence[str]) -> None:
    """Read the reason until the pipe's other end is closed, by the driver or by its end."""
    run_dir, made_of, module, function = arguments
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # it ends with the driver
    why = sys.stdin.read()
    if why == _NOTHING:
        return
    if sys.stdout.isatty():
        print("\x1b[?25h", end="")  # the cursor, which a progress bar hides
    print(f"stopped: {why or _UNKNOWN}", flush=True)
    if (Path(run_dir) / made_of).is_file():
        write_report: Callable[[Path], Path] = getattr(import_module(module), function)
        try:
            print(f"report of what was done: {write_report(Path(run_dir))}")
        except OSError as error:
            print(f"no report could be written: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
