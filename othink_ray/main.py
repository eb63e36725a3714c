"""The entry point:  python -m othink_ray.main --help"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType


def main(arguments: Sequence[str]) -> int:
    """The exit status of what the command line says; 2 for a configuration that is not sound."""
    from othink_ray.command_line import run_command  # imported after the signal handlers are installed

    return run_command(arguments)


def end_at_once(number: int, frame: FrameType | None) -> None:
    """Handle a signal while nothing has started yet that would have to be cleaned up."""
    try:
        os.write(1, b"interrupted\n")
    finally:
        os._exit(128 + number)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end_at_once)
    sys.exit(main(sys.argv[1:]))
