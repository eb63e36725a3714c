"""The entry point:  python -m othink_ray.main --help"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType


def main(arguments: Sequence[str]) -> int:
    """The exit status of what the command line says; 2 for a configuration that is not sound."""
    from othink_ray.command_line import run_command  # after Ctrl-C has its answer

    return run_command(arguments)


def end_at_once(number: int, frame: FrameType | None) -> None:
    """A signal handler for as long as nothing has started that would have to be cleaned up."""
    os.write(1, b"interrupted\n")
    os._exit(128 + number)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end_at_once)
    sys.exit(main(sys.argv[1:]))
