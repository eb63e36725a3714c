"""Ctrl-C, `kill` and a lost Ray: the run ends soon, says so, leaves a report and no process."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from othink_ray.driver import checkpoint
from tests.drills.faults import steps_done
from tests.e2e.conftest import SMALL, Run

pytestmark = pytest.mark.slow

MARK = "OTHINK_RAY_TEST_RUN"


def processes_with(mark: str) -> list[int]:
    """Return the ids of all processes that inherited this mark in their environment."""
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


@dataclass(frozen=True)
class Ended:
    status: int
    screen: str


def ended_by(
    strike: signal.Signals | Callable[[psutil.Process], None], cache: Path, folder: Path, *overrides: str
) -> Ended:
    """Start a run as a process with a private Ray (which must end too), strike it after two steps, and wait."""
    mark = uuid.uuid4().hex
    folders = (f"run.dir={folder}", f"run.cache_dir={cache}")
    run = subprocess.Popen(
        [sys.executable, "-m", "othink_ray.main", *SMALL, "train.steps=500", *folders, *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {MARK: mark, "CI": "true"},
    )
    metrics = folder / "metrics.jsonl"
    assert wait_until(lambda: metrics.is_file() and metrics.read_text().count("\n") >= 2, 120)
    if isinstance(strike, signal.Signals):
        run.send_signal(strike)
    else:
        strike(psutil.Process(run.pid))
    screen, _ = run.communicate(timeout=60)
    assert "Traceback" not in screen
    assert (folder / "report.html").is_file()
    assert wait_until(lambda: not processes_with(mark), 60), processes_with(mark)
    return Ended(run.returncode, screen)


def test_ctrl_c_ends_a_run_with_a_report_and_no_orphans(plain_run: Run, cache: Path, tmp_path: Path) -> None:
    ended = ended_by(signal.SIGINT, cache, tmp_path, "train.overlap=true")
    assert ended.status == 130, ended.screen
    assert "interrupted" in ended.screen


def test_sigterm_finishes_and_saves_the_step(plain_run: Run, cache: Path, tmp_path: Path) -> None:
    """Slurm and spot machines send SIGTERM."""
    ended = ended_by(signal.SIGTERM, cache, tmp_path, "train.checkpoint_every=0")
    assert ended.status == 143, ended.screen
    assert "stopping after this step is finished and saved" in ended.screen
    last = steps_done(tmp_path)
    assert f"step {last} of 500 is saved; run.resume=auto resumes from it" in ended.screen
    assert checkpoint.find(tmp_path, "auto", 0, print)[1].step == last


@pytest.mark.parametrize(
    ("phase", "overrides"),
    [
        ("starting Ray ...", ()),
        ("loading the rollout engines and the learner ...", ()),
        ("loading the rollout engines and the learner ...", ("train.overlap=true", "learner.world_size=2")),
        ("evaluating", ("mode=eval",)),
    ],
)
def test_sigterm_before_any_step_says_so_and_leaves_no_process(
    plain_run: Run, cache: Path, tmp_path: Path, phase: str, overrides: Sequence[str]
) -> None:
    mark = uuid.uuid4().hex
    settings = (f"run.dir={tmp_path / 'run'}", f"run.cache_dir={cache}", "train.steps=500", *overrides)
    run = subprocess.Popen(
        [sys.executable, "-m", "othink_ray.main", *SMALL, *settings],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {MARK: mark, "CI": "true"},
    )
    assert run.stdout is not None
    shown = []
    for line in run.stdout:
        shown.append(line)
        if line.startswith(phase):
            break
    time.sleep(random.uniform(0.0, 2.0))
    run.send_signal(signal.SIGTERM)
    rest, _ = run.communicate(timeout=90)
    screen = "".join(shown) + rest
    assert run.returncode == 143, screen
    assert "interrupted" in rest, screen
    assert "Traceback" not in screen and "Aborted" not in screen and "*** SIG" not in screen, screen
    assert wait_until(lambda: not processes_with(mark), 60), processes_with(mark)


def test_a_driver_that_is_killed_leaves_a_line_and_a_report(plain_run: Run, cache: Path, tmp_path: Path) -> None:
    ended = ended_by(signal.SIGKILL, cache, tmp_path)
    assert ended.status == -9, ended.screen
    assert "stopped: its process died without an error message" in ended.screen
    assert "partial report" in ended.screen


def test_a_run_whose_dashboard_agent_is_killed_says_so(plain_run: Run, cache: Path, tmp_path: Path) -> None:
    """Its raylet shuts down with it, and Ray then exits the driver within a tenth of a second."""

    def kill(run: psutil.Process) -> None:
        [agent] = [child for child in run.children(recursive=True) if "ray::DashboardAgent" in child.cmdline()]
        agent.kill()

    ended = ended_by(kill, cache, tmp_path)
    assert ended.status == 1, ended.screen
    assert re.search("stopped: (Ray's raylet on this node|its process died)", ended.screen), ended.screen
    assert "partial report: " in ended.screen


@pytest.mark.parametrize(("name", "message"), [("raylet", "raylet on this node has ended"), ("gcs_server", "GCS at ")])
def test_a_run_that_loses_ray_says_so_in_one_line(
    plain_run: Run, cache: Path, tmp_path: Path, name: str, message: str
) -> None:
    """Without the watch Ray exits the driver within seconds, with parts of its logs on the screen and no report."""

    def kill(run: psutil.Process) -> None:
        [process] = [child for child in run.children() if child.name() == name]
        process.kill()

    ended = ended_by(kill, cache, tmp_path)
    assert ended.status == 1, ended.screen
    assert f"stopped: Ray's {message}" in ended.screen
    assert "run.resume=auto resumes the run" in ended.screen
    assert "partial report: " in ended.screen
    assert "node_manager.cc" not in ended.screen and "rpc_client.h" not in ended.screen, ended.screen
