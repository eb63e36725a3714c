"""A run on two hosts, one of which goes away."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from tests.drills.faults import lines, steps_done
from tests.drills.hosts import two_hosts, why_not
from tests.e2e.conftest import SMALL
from tests.e2e.test_interrupt import MARK, processes_with, wait_until

STEPS = 6


@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
def test_a_run_goes_on_with_what_is_left_when_the_cable_of_a_host_is_pulled(tmp_path: Path) -> None:
    mark = uuid.uuid4().hex
    os.environ[MARK] = mark
    try:
        with two_hosts(cpus=1) as hosts, (tmp_path / "screen.txt").open("w") as screen:
            overrides = (
                *(f"run.dir={tmp_path / 'run'}", f"run.cache_dir={tmp_path}", f"cluster.address={hosts.address}"),
                *("cluster.placement=SPREAD", "rollout.num_actors=3", "faults.lost_node=continue"),
                *(f"train.steps={STEPS}", "train.checkpoint_every=1", "rollout.step_timeout_s=60"),
                *("rollout.threads=1", "learner.threads=1", "model.tiny.warm_steps=0", "rollout.max_tokens=32"),
            )
            run = subprocess.Popen(
                hosts.on("head", sys.executable, "-m", "othink_ray.main", *SMALL, *overrides),
                stdout=screen,
                stderr=subprocess.STDOUT,
                env=os.environ | hosts.environment | {"CI": "true"},
            )
            assert wait_until(lambda: steps_done(tmp_path / "run") >= 2, 180), (tmp_path / "screen.txt").read_text()
            hosts.cable("down")
            status = run.wait(240)
    finally:
        del os.environ[MARK]
    said = (tmp_path / "screen.txt").read_text()
    assert status == 0, said
    assert "on what is left: 1 of 3 rollout actors" in said
    assert [line["step"] for line in lines(tmp_path / "run")] == list(range(STEPS))
    assert wait_until(lambda: not processes_with(mark), 60), processes_with(mark)
