"""Requests to end a run that come before its first step."""

from __future__ import annotations

import io
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from othink_ray.driver import stopping
from othink_ray.driver.console import Console


class Dropped:
    """Python prints and drops what is raised in a destructor."""

    def __del__(self) -> None:
        stopping.terminate(signal.SIGTERM, None)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_sigterm_that_python_dropped_ends_the_run_before_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "_terminated", threading.Event())
    with stopping.finishing_steps(print) as request:
        assert not request.made
    dropped = Dropped()
    del dropped
    with pytest.raises(KeyboardInterrupt), stopping.finishing_steps(print):
        pass
    console = Console(io.StringIO())
    with pytest.raises(KeyboardInterrupt), console.phase("loading"):
        pytest.fail("the phase went on")
    with pytest.raises(KeyboardInterrupt):
        console.progress(1, 2)
    assert stopping.interrupted_status() == 143


def test_an_interrupt_within_an_import_does_not_hang_the_run(tmp_path: Path) -> None:
    """It can leave Python's import lock held, for which the imports beside it then wait for ever."""
    program = """
import _imp
import sys
from contextlib import contextmanager
from othink_ray.config.load import load
from othink_ray.driver import run

@contextmanager
def interrupted(cluster):
    _imp.acquire_lock()
    raise KeyboardInterrupt
    yield

run.ray_session = interrupted
sys.exit(run.run(load([f"run.dir={sys.argv[1]}"]), lambda folder: folder))
"""
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], timeout=60, capture_output=True, text=True)
    assert done.returncode == 130, done.stderr
    assert "interrupted" in done.stdout
