"""Process that has imported the tests' dependencies, but no module of this project, and runs tests in forks.

    python -m tests.mutants.fork_server

Reads lines of JSON (`tests`, `timeout_s`, `screen`) and answers each with its exit status; null: stopped at its limit.
The limit is on CPU time, so that nothing counts as hung on a busy machine; a sleeping test is stopped at five times the
limit. Torch takes seconds to import and a test of `core/` milliseconds. No thread may start before the forks: torch
starts its threads with its first operation, so the server only imports.
"""

from __future__ import annotations

import gc
import importlib
import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

OURS = ("othink_ray", "tests", "__main__")
_LISTED = (
    "import sys, tests.conftest, hypothesis, _pytest.assertion.rewrite, pytest_timeout; "
    "print(' '.join(name for name, module in sys.modules.items() if getattr(module, '__spec__', None)))"
)


def preload() -> None:
    """Import what the tests' conftest imports, in its order, except the modules of this project."""
    listed = subprocess.run([sys.executable, "-c", _LISTED], capture_output=True, text=True, check=True)
    for name in listed.stdout.splitlines()[-1].split():
        if name.partition(".")[0] not in OURS:
            with suppress(Exception):  # created by another module, or an optional import
                importlib.import_module(name)


def run(tests: list[str], timeout_s: float, screen: Path) -> int | None:
    """Run pytest on `tests` in a fork and kill its process group; return the exit status, or None at the limit."""
    child = os.fork()
    if child == 0:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(timeout_s), math.ceil(timeout_s) + 5))
        with screen.open("wb") as file:
            for stream in (1, 2):
                os.dup2(file.fileno(), stream)
        import pytest

        status = 1  # the end of the interpreter is a failure too
        try:
            status = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *tests]))
        finally:
            os._exit(status)
    until = time.monotonic() + 5 * timeout_s
    status: int | None = None
    while status is None and time.monotonic() < until:
        done, code = os.waitpid(child, os.WNOHANG)
        if done:
            status = os.waitstatus_to_exitcode(code)
        else:
            time.sleep(0.01)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)
    if status is None:
        os.waitpid(child, 0)
    return None if status == -signal.SIGXCPU else status


def main() -> None:
    preload()
    gc.freeze()  # else each fork's first collection copies the pages of all imports
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(run(request["tests"], request["timeout_s"], Path(request["screen"]))), flush=True)


if __name__ == "__main__":
    main()
