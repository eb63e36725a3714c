"""Requests to end a run that come before its first step."""

from __future__ import annotations

import io
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from othink_ray.config.load import load
from othink_ray.driver import stopping, training
from othink_ray.driver.console import Console
from othink_ray.runtime.futures import ProcessLost


class Dropped:
    """Python prints and drops what is raised in a destructor."""

    def __del__(self) -> None:
        stopping.interrupt(signal.SIGTERM, None)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_sigterm_that_python_dropped_ends_the_run_before_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "_interrupts", [])
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


def test_a_request_that_is_repeated_at_once_is_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `ray job stop` of a study makes it: Ray signals all processes, and the study its runs."""
    clock = {"now": 0.0}
    monkeypatch.setattr(stopping.time, "monotonic", lambda: clock["now"])
    told: list[str] = []
    with stopping.interruptible():
        with stopping.finishing_steps(told.append) as request:
            for clock["now"] in (100.0, 100.5, 101.9):
                signal.raise_signal(signal.SIGTERM)
                assert request.made and len(told) == 1
            clock["now"] = 102.1
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGTERM)
        assert stopping.stop_requested() and stopping.interrupted_status() == 143
    with stopping.interruptible():
        assert not stopping.stop_requested()


def test_a_request_outlives_a_restart_of_the_processes() -> None:
    with stopping.interruptible():
        with stopping.finishing_steps(print):
            signal.raise_signal(signal.SIGTERM)
        with stopping.finishing_steps(print) as again:
            assert again.made and not stopping.interrupted()
    stopping._request.since_s = None


def test_nothing_starts_again_after_a_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lose(*_: object) -> None:
        raise ProcessLost("a learner rank died")

    monkeypatch.setattr(training, "_train", lose)
    monkeypatch.setattr(training, "stop_requested", lambda: True)
    with pytest.raises(stopping.Stopped, match="goes on after step 0"):
        training.train_model(load([]), tmp_path, Console(io.StringIO()), lambda folder: folder, started=0.0)


HELD_LOCKS = {
    "KeyboardInterrupt within an import": ("_imp.acquire_lock()", "raise"),
    "KeyboardInterrupt within logging": ("logging._lock.acquire()", "raise"),
    "another exception, which a library made of it": ("logging._lock.acquire()", "raise OSError('failed')"),
}
INTERRUPTED = """
import _imp, logging, signal, subprocess, sys
from contextlib import contextmanager
from othink_ray.config.load import load
from othink_ray.driver import run

@contextmanager
def starting(cluster):
    subprocess.Popen(["sleep", "300"])  # as Ray's servers
    {take}
    try:
        signal.raise_signal(signal.SIGTERM)
    except KeyboardInterrupt:
        {then}
    yield

run.ray_session = starting
sys.exit(run.run(load([f"run.dir={{sys.argv[1]}}"]), lambda folder: folder))
"""


@pytest.mark.parametrize("name", HELD_LOCKS)
def test_an_interrupt_that_leaves_a_lock_held_ends_the_run(name: str, tmp_path: Path) -> None:
    """The imports beside Ray's start then wait for ever."""
    take, then = HELD_LOCKS[name]
    program = INTERRUPTED.format(take=take, then=then)
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], timeout=60, capture_output=True, text=True)
    assert done.returncode == 143, done.stderr
    assert "interrupted" in done.stdout and "Traceback" not in done.stderr
