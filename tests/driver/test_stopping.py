"""Requests to end a run that come before its first step."""

from __future__ import annotations

import signal
import threading

import pytest

from othink_ray.driver import stopping


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
    assert stopping.interrupted_status() == 143
