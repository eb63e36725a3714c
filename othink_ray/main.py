"""Entry point:  python -m othink_ray.main --help"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType


def main(arguments: Sequence[str]) -> int:
    """Run the command line and return its exit status; 2 for an invalid configuration."""
    from othink_ray.command_line import run_command  # imported after the signal handlers are installed

    return run_command(arguments)


def exit_at_once(number: int, frame: FrameType | None) -> None:
    """Handle a signal by exiting with 128 + its number: nothing has started yet that needs cleanup."""
    try:
        os.write(1, b"interrupted\n")
    finally:
        os._exit(128 + number)


def exit_on_signals() -> None:
    """Exit at once on Ctrl-C and SIGTERM, until a mode installs its handlers."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, exit_at_once)


if __name__ == "__main__":
    exit_on_signals()
    sys.exit(main(sys.argv[1:]))
