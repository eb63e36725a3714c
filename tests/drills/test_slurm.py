"""A Slurm of its own: a job whose time runs out is queued again, and ends as if nothing had been."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest

from tests.drills.ground import Ground
from tests.drills.slurm import one_job, slurm, why_no_slurm

FIRST_PORT = 20010  # that the first job of a Slurm tries
pytestmark = [pytest.mark.skipif(why_no_slurm() is not None, reason=str(why_no_slurm())), pytest.mark.timeout(900)]


def test_a_job_requeued_at_its_limit_ends_like_a_plain_one(tmp_path: Path) -> None:
    ground = Ground(tmp_path / "ground", times=2, seed=0)
    with slurm(ground.folder / "slurm") as here:
        outcome = one_job(ground, here, nodes=2, times=1, dice=random.Random(0))
    assert not outcome.wrong, outcome


def test_a_node_is_freed_at_once_and_left_clean(tmp_path: Path) -> None:
    """Although somebody else listens where the job's Ray would."""
    listen = f"import socket, time; server = socket.create_server(('', {FIRST_PORT})); time.sleep(300)"
    with slurm(tmp_path / "slurm") as here, subprocess.Popen(here.on(0, sys.executable, "-c", listen)) as other:
        try:
            log = tmp_path / "job.txt"
            job = here.submit("--nodes=2", settings=("mode=check",), log=log)
            ended = here.wait(job, 120)
            assert ended["JobState"] == "COMPLETED", log.read_text()
            assert "configuration is sound" in log.read_text()
            node = (tmp_path / "slurm" / "slurmd-n1.log").read_text()
            asked, freed = (
                datetime.fromisoformat(time)
                for words in (r"error: \*\*\* STEP", "done with job")
                for time in re.findall(rf"\[(\S+)\] \[{job}\.1\] {words}", node)
            )
            assert (freed - asked).total_seconds() < 20, node  # 65 where Ray waits for its work to drain
            assert not list(Path("/tmp").glob(f"ray-*-{job}-*"))
            assert other.poll() is None
        finally:
            other.kill()


def test_a_job_at_its_limit_while_ray_starts_says_why_it_ends(tmp_path: Path) -> None:
    with slurm(tmp_path / "slurm") as here:
        log = tmp_path / "job.txt"
        job = here.submit("--nodes=1", "--signal=B:USR1@1", settings=(f"run.dir={tmp_path / 'run'}",), log=log)
        here.until(job, lambda _: bool(list(Path("/tmp").glob(f"ray-*-{job}-*"))), 60)
        here.run_out(job)
        ended = here.wait(job, 90)
        assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "143:0"), log.read_text()
        assert "not requeued: no step was saved" in log.read_text()
        assert not (tmp_path / "run").exists()
        assert not list(Path("/tmp").glob(f"ray-*-{job}-*"))
