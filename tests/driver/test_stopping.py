"""Stop requests and interrupts, also before the first step."""

from __future__ import annotations

import io
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from othink_ray.config.load import load
from othink_ray.driver import stopping, training
from othink_ray.driver.console import Console
from othink_ray.runtime.futures import ProcessLost

TIMEOUT_S = 30


class Dropped:
    """Interrupts inside a destructor, where Python prints and drops exceptions."""

    def __del__(self) -> None:
        stopping.interrupt(signal.SIGTERM, None)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_sigterm_dropped_by_python_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "_interrupts", [])
    with stopping.finishing_steps(print) as request:
        assert not request.made
    dropped = Dropped()
    del dropped
    with pytest.raises(KeyboardInterrupt), stopping.finishing_steps(print):
        pass
    console = Console(io.StringIO())
    with pytest.raises(KeyboardInterrupt), console.phase("loading"):
        pytest.fail("the phase continued")
    with pytest.raises(KeyboardInterrupt):
        console.progress(1, 2)
    assert stopping.interrupted_status() == 143


def test_a_lost_interrupt_ends_the_wait_for_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python may drop the exception inside the import system, with a lock held that the thread needs."""
    held = threading.Event()
    thread = threading.Thread(target=held.wait, args=(TIMEOUT_S,))
    thread.start()
    monkeypatch.setattr(stopping, "_interrupts", [signal.SIGTERM])
    try:
        with pytest.raises(KeyboardInterrupt):
            stopping.join_unless_interrupted(thread)
        assert thread.is_alive()
        held.set()
        monkeypatch.setattr(stopping, "_interrupts", [])
        stopping.join_unless_interrupted(thread)
        assert not thread.is_alive()
    finally:
        held.set()


@pytest.mark.parametrize(("error", "shown"), [("KeyboardInterrupt", ""), ("ValueError", "ValueError: dropped")])
def test_a_dropped_interrupt_is_not_printed(error: str, shown: str) -> None:
    program = f"""
import signal
from othink_ray.driver import stopping

TIMEOUT_S = 30


class Dropped:
    def __del__(self):
        stopping._interrupts.append(signal.SIGTERM)
        raise {error}("dropped")

with stopping.interruptible():
    Dropped()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert (shown in done.stderr) if shown else (done.stderr == "")


def test_a_request_repeated_within_two_seconds_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """`ray job stop` of a study sends it: Ray signals all processes, and the study signals its runs."""
    clock = {"now": 0.0}
    monkeypatch.setattr(stopping.time, "monotonic", lambda: clock["now"])
    logged: list[str] = []
    with stopping.interruptible():
        with stopping.finishing_steps(logged.append) as request:
            for clock["now"] in (100.0, 100.5, 101.9):
                signal.raise_signal(signal.SIGTERM)
                assert request.made and len(logged) == 1
            clock["now"] = 102.1
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGTERM)
        assert stopping.stop_requested() and stopping.interrupted_status() == 143
    with stopping.interruptible():
        assert not stopping.stop_requested()


def test_a_stop_request_survives_a_restart_of_the_processes() -> None:
    with stopping.interruptible():
        with stopping.finishing_steps(print):
            signal.raise_signal(signal.SIGTERM)
        with stopping.finishing_steps(print) as again:
            assert again.made and not stopping.interrupted()
    stopping._request.since_s = None


def test_no_process_is_restarted_after_a_stop_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lose(*_: object) -> None:
        raise ProcessLost("a learner rank died")

    monkeypatch.setattr(training, "_train", lose)
    monkeypatch.setattr(training, "stop_requested", lambda: True)
    with pytest.raises(stopping.Stopped, match=r"run\.resume=auto resumes after step 0"):
        training.train_model(load([]), tmp_path, Console(io.StringIO()), lambda folder: folder, started=0.0)


HELD_LOCKS = {
    "KeyboardInterrupt within an import": ("_imp.acquire_lock()", "raise"),
    "KeyboardInterrupt within logging": ("logging._lock.acquire()", "raise"),
    "another exception, raised by a library instead": ("logging._lock.acquire()", "raise OSError('failed')"),
}
INTERRUPTED = """
import _imp, logging, signal, subprocess, sys
from contextlib import contextmanager
from othink_ray.config.load import load
from othink_ray.driver import run

@contextmanager
def starting(cluster):
    subprocess.Popen(["sleep", "300"])  # like Ray's servers
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
    """The background imports then wait forever."""
    take, then = HELD_LOCKS[name]
    program = INTERRUPTED.format(take=take, then=then)
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], timeout=60, capture_output=True, text=True)
    assert done.returncode == 143, done.stderr
    assert "interrupted" in done.stdout and "Traceback" not in done.stderr
