"""Ctrl-C: the run ends soon, says so, leaves a report, and leaves no process behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.conftest import SMALL, Run

MARK = "OTHINK_RAY_TEST_RUN"


def processes_with(mark: str) -> list[int]:
    """Ids of all processes that inherited this mark."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if f"{MARK}={mark}".encode() in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def wait_until(holds: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if holds():
            return True
        time.sleep(0.2)
    return False


@pytest.mark.parametrize("overlap", ["false", "true"])
def test_ctrl_c_ends_the_run_with_a_report_and_without_orphans(
    plain_run: Run, cache: Path, tmp_path: Path, overlap: str
) -> None:
    """As a process with a Ray of its own, for that Ray must go too."""
    mark = uuid.uuid4().hex
    command = [sys.executable, "-m", "othink_ray.main", *SMALL, "train.steps=500", f"train.overlap={overlap}"]
    run = subprocess.Popen(
        [*command, f"run.dir={tmp_path}", f"run.cache_dir={cache}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {MARK: mark, "CI": "true"},
    )
    metrics = tmp_path / "metrics.jsonl"
    assert wait_until(lambda: metrics.is_file() and metrics.read_text().count("\n") >= 2, 120)
    run.send_signal(signal.SIGINT)
    screen, _ = run.communicate(timeout=60)
    assert run.returncode == 130, screen
    assert "interrupted" in screen
    assert "Traceback" not in screen
    assert (tmp_path / "report.html").is_file()
    assert wait_until(lambda: not processes_with(mark), 20), processes_with(mark)
