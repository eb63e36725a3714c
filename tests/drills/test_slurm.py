"""Jobs in a private Slurm: a job at its time limit is requeued and ends like an uninterrupted one."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest

from tests.drills.harness import Harness
from tests.drills.slurm import missing_slurm, one_job, slurm

FIRST_PORT = 20010  # the first port that the first job of a Slurm tries
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(missing_slurm() is not None, reason=str(missing_slurm())),
    pytest.mark.timeout(900),
]


def test_a_job_requeued_at_its_limit_ends_like_a_plain_one(tmp_path: Path) -> None:
    harness = Harness(tmp_path / "ground", times=2, seed=0)
    with slurm(harness.folder / "slurm") as cluster:
        outcome = one_job(harness, cluster, nodes=2, times=1, dice=random.Random(0))
    assert not outcome.wrong, outcome


def test_a_node_is_freed_at_once_and_left_clean(tmp_path: Path) -> None:
    """Another process listens at the port that the job's Ray tries first."""
    listen = f"import socket, time; server = socket.create_server(('', {FIRST_PORT})); time.sleep(300)"
    with slurm(tmp_path / "slurm") as cluster, subprocess.Popen(cluster.on(0, sys.executable, "-c", listen)) as other:
        try:
            log = tmp_path / "job.txt"
            job = cluster.submit("--nodes=2", settings=("mode=check",), log=log)
            ended = cluster.wait(job, 120)
            assert ended["JobState"] == "COMPLETED", log.read_text()
            assert "configuration is sound" in log.read_text()
            node = (tmp_path / "slurm" / "slurmd-n1.log").read_text()
            stopped, freed = (
                datetime.fromisoformat(time)
                for words in (r"error: \*\*\* STEP", "done with job")
                for time in re.findall(rf"\[(\S+)\] \[{job}\.1\] {words}", node)
            )
            assert (freed - stopped).total_seconds() < 20, node  # 65 where Ray waits for its work to drain
            assert not list(Path("/tmp").glob(f"ray-*-{job}-*"))
            assert other.poll() is None
        finally:
            other.kill()


def test_a_job_at_its_limit_while_ray_starts_says_why_it_ends(tmp_path: Path) -> None:
    with slurm(tmp_path / "slurm") as cluster:
        log = tmp_path / "job.txt"
        job = cluster.submit("--nodes=1", "--signal=B:USR1@1", settings=(f"run.dir={tmp_path / 'run'}",), log=log)
        cluster.until(job, lambda _: bool(list(Path("/tmp").glob(f"ray-*-{job}-*"))), 60)
        cluster.run_out(job)
        ended = cluster.wait(job, 90)
        assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "143:0"), log.read_text()
        assert "not requeued: no step was saved" in log.read_text()
        assert not (tmp_path / "run").exists()
        assert not list(Path("/tmp").glob(f"ray-*-{job}-*"))
