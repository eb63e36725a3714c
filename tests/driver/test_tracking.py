"""Weights & Biases, the real one, offline: what its files hold after a run that was interrupted and resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from wandb.proto import wandb_internal_pb2

from othink_ray.config.schema import WandbConfig
from othink_ray.driver.metrics import RunRecords
from tests.driver.test_metrics import scored_group


def live(run_dir: Path, steps: range, *, killed: bool = False) -> None:
    """Logs `steps` as a run does that goes on from the first of them, and fails or is killed behind the last."""
    offline = WandbConfig(mode="offline", project="test", samples_every=2)
    with (
        warnings.catch_warnings(),
        RunRecords(
            run_dir, wandb=offline, config_yaml="{}", environment={}, tell=pytest.fail, resume_step=steps.start - 1
        ) as records,
    ):
        warnings.simplefilter("error", RuntimeWarning)
        for step in steps:
            records.log(step, {"entropy": float(step)})
            records.sample(step, scored_group(), np.array([1.0, -1.0]))
        if killed:
            os.kill(os.getpid(), signal.SIGKILL)
        raise KeyboardInterrupt


def interrupted(run_dir: Path, steps: range) -> None:
    with pytest.raises(KeyboardInterrupt):
        live(run_dir, steps)


def records_in(path: Path) -> Iterator[wandb_internal_pb2.Record]:
    """Of an offline run's file: LevelDB's log format after a header of 7 bytes."""
    content, place, record = path.read_bytes(), 7, b""
    while place + 7 <= len(content):
        left = 2**15 - place % 2**15
        if left < 7:  # a block ends with zeros where no header fits
            place += left
            continue
        size, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        record += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield wandb_internal_pb2.Record.FromString(record)
            record = b""


def sent(run_dir: Path) -> list[tuple[int, set[str]]]:
    """(step, names) of each history record of all the offline files in a run's folder, by step; they have one id."""
    found, ids = [], set()
    for path in sorted((run_dir / "wandb").glob("offline-run-*/run-*.wandb")):
        for record in records_in(path):
            if record.WhichOneof("record_type") == "run":
                ids.add(record.run.run_id)
            if record.WhichOneof("record_type") == "history":
                names = {".".join(item.nested_key) or item.key for item in record.history.item}
                found.append((record.history.step.num, {name for name in names if not name.startswith("_")}))
    assert ids == {(run_dir / "wandb_id").read_text().strip()}
    return sorted(found, key=lambda one: one[0])


def test_a_resumed_run_sends_no_step_that_wandb_has(tmp_path: Path) -> None:
    interrupted(tmp_path, range(5))
    interrupted(tmp_path, range(2, 4))  # stopped before it is where it was
    interrupted(tmp_path, range(3, 8))
    assert [step for step, _ in sent(tmp_path)] == list(range(8))
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [*range(8)]


def test_tables_of_samples_go_with_their_steps(tmp_path: Path) -> None:
    interrupted(tmp_path, range(5))
    interrupted(tmp_path, range(3, 7))
    with_table = [step for step, names in sent(tmp_path) if any(name.startswith("samples") for name in names)]
    assert with_table == [1, 3, 4, 5, 6]  # every second one, and the last one of each start
    assert all("entropy" in names for _, names in sent(tmp_path))


def test_a_run_that_was_killed_goes_on_with_the_step_it_had_not_sent(tmp_path: Path) -> None:
    script = f"from tests.driver.test_tracking import *; live(Path({str(tmp_path)!r}), range(4), killed=True)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -signal.SIGKILL
    interrupted(tmp_path, range(2, 6))
    steps = [step for step, _ in sent(tmp_path)]
    assert len(set(steps)) == len(steps)
    assert steps[-3:] == [3, 4, 5]  # of what came before, wandb keeps what its own process had written


def test_a_fresh_start_in_the_same_folder_is_a_run_of_its_own(tmp_path: Path) -> None:
    interrupted(tmp_path, range(3))
    first = (tmp_path / "wandb_id").read_text()
    for old in (tmp_path / "wandb").glob("offline-run-*"):
        old.rename(tmp_path / old.name)
    interrupted(tmp_path, range(2))
    assert (tmp_path / "wandb_id").read_text() != first
    assert [step for step, _ in sent(tmp_path)] == [0, 1]
