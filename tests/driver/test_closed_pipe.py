"""A run continues and ends normally if its output has no reader."""

from __future__ import annotations

import subprocess
import sys

PRINTING = """
import sys
from othink_ray.driver.console import Console
with Console() as console:
    console.say("first")
    sys.stdin.readline()
    for number in range(3):
        console.say("unread")
        with console.phase("a phase"):
            console.progress(1, 1)
sys.exit(7)
"""


def test_a_pipe_without_a_reader_changes_nothing() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PRINTING], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as printing:
        assert printing.stdin and printing.stdout and printing.stderr
        assert printing.stdout.readline() == b"first\n"
        printing.stdout.close()
        printing.stdin.write(b"\n")
        printing.stdin.close()
        errors = printing.stderr.read()
    assert (printing.returncode, errors) == (7, b"")
