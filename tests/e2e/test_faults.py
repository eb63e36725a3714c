"""Runs that lose processes or their driver end like an intact run. `make drills` is the long form."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import psutil
import pytest

from othink_ray.driver import checkpoint
from tests.drills.faults import Fault, Saboteur, steps_done
from tests.e2e.conftest import SMALL, Run, StartRun
from tests.e2e.test_interrupt import MARK, processes_with, wait_until
from tests.e2e.test_run import furthest_apart, weights

EXACT = ("reward/mean", "kl/beta", "tokens/completion_mean", "groups/constant_frac")


def sampled(run: Run) -> list[tuple[str, list[str]]]:
    """Return (prompt id, answers) of each step's samples."""
    samples = [json.loads(line) for line in (run.folder / "samples.jsonl").read_text().splitlines()]
    return [(sample["prompt_id"], [answer["text"] for answer in sample["completions"]]) for sample in samples]


def assert_same_run(found: Run, expected: Run) -> None:
    """Assert equal samples and betas at every step, each step once, and equal final weights."""
    assert [line["step"] for line in found.steps] == [line["step"] for line in expected.steps]
    for one, other in zip(found.steps, expected.steps, strict=True):
        assert {name: one[name] for name in EXACT} == {name: other[name] for name in EXACT}
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-3, abs=1e-6)
    assert sampled(found) == sampled(expected)
    assert furthest_apart(weights(found.folder), weights(expected.folder)) < 1e-4


def test_a_run_that_loses_processes_ends_like_an_intact_one(
    plain_run: Run, start_run: StartRun, tmp_path: Path
) -> None:
    faults = [
        Fault("rollout", signal.SIGKILL, 1),
        Fault("reward", signal.SIGKILL, 2),
        Fault("learner", signal.SIGKILL, 3),
    ]
    with Saboteur(psutil.Process(), tmp_path, faults, seed=0, within_s=0.1) as saboteur:
        hurt = start_run("rollout.num_actors=2", "train.checkpoint_every=1", folder=tmp_path)
    assert [fault for fault, _ in saboteur.done] == faults
    assert_same_run(hurt, plain_run)
    assert "a rollout actor is back after" in hurt.screen
    assert "restarting all processes; training resumes after step" in hurt.screen
    assert hurt.summary["restarts"] == 2


@pytest.mark.slow
def test_a_run_whose_driver_is_killed_resumes_exactly(
    plain_run: Run, start_run: StartRun, cache: Path, tmp_path: Path
) -> None:
    mark = uuid.uuid4().hex
    folders = (f"run.dir={tmp_path}", f"run.cache_dir={cache}")
    run = subprocess.Popen(
        [sys.executable, "-m", "othink_ray.main", *SMALL, "train.checkpoint_every=1", *folders],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {MARK: mark, "CI": "true"},
    )
    assert wait_until(lambda: steps_done(tmp_path) >= 2, 120)
    time.sleep(0.4)
    run.kill()
    run.wait()
    assert wait_until(lambda: not processes_with(mark), 90), processes_with(mark)  # Ray's agents take half a minute
    found, state = checkpoint.find(tmp_path, "auto", 0, print)
    assert found is not None
    assert 1 <= state.step < 4
    assert_same_run(start_run("run.resume=auto", "train.checkpoint_every=1", folder=tmp_path), plain_run)
