"""A Slurm of its own: a job whose time runs out is queued again, and ends as if nothing had been."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.drills.ground import Ground
from tests.drills.slurm import one_job, slurm, why_no_slurm

pytestmark = [pytest.mark.skipif(why_no_slurm() is not None, reason=str(why_no_slurm())), pytest.mark.timeout(900)]


def test_a_job_whose_time_runs_out_ends_as_one_that_was_left_in_peace(tmp_path: Path) -> None:
    ground = Ground(tmp_path / "ground", times=2, seed=0)
    with slurm(ground.folder / "slurm") as here:
        outcome = one_job(ground, here, nodes=2, times=1, dice=random.Random(0))
    assert not outcome.wrong, outcome


def test_a_node_is_free_at_once_and_nothing_is_left_on_it(tmp_path: Path) -> None:
    with slurm(tmp_path / "slurm") as here:
        log = tmp_path / "job.txt"
        job = here.submit("--nodes=2", settings=("mode=check",), log=log)
        ended = here.wait(job, 120)
        assert ended["JobState"] == "COMPLETED", log.read_text()
        assert "configuration is sound" in log.read_text()
        assert not list(Path("/tmp").glob(f"ray-*-{job}-*"))
