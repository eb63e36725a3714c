"""The files that the real wandb writes offline for a run that was interrupted and resumed."""

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


def log_steps(run_dir: Path, steps: range, *, killed: bool = False) -> None:
    """Log `steps` like a run resumed at the first of them that fails, or is killed, after the last."""
    offline = WandbConfig(mode="offline", project="test", samples_every=2)
    with (
        warnings.catch_warnings(),
        RunRecords(
            run_dir, wandb=offline, config_yaml="{}", environment={}, log=pytest.fail, resume_step=steps.start - 1
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
        log_steps(run_dir, steps)


def records_in(path: Path) -> Iterator[wandb_internal_pb2.Record]:
    """Yield the records of an offline run's file: LevelDB's log format after a header of 7 bytes."""
    content, offset, record = path.read_bytes(), 7, b""
    while offset + 7 <= len(content):
        left = 2**15 - offset % 2**15
        if left < 7:  # zeros pad a block whose rest is too small for a header
            offset += left
            continue
        size, kind = int.from_bytes(content[offset + 4 : offset + 6], "little"), content[offset + 6]
        record += content[offset + 7 : offset + 7 + size]
        offset += 7 + size
        if kind in (1, 4):  # a full record, or its last part
            yield wandb_internal_pb2.Record.FromString(record)
            record = b""


def sent(run_dir: Path) -> list[tuple[int, set[str]]]:
    """Return (step, metric names) of each history record in all offline files of a run, by step; check the run id."""
    found, ids = [], set()
    for path in sorted((run_dir / "wandb").glob("offline-run-*/run-*.wandb")):
        for record in records_in(path):
            if record.WhichOneof("record_type") == "run":
                ids.add(record.run.run_id)
            if record.WhichOneof("record_type") == "history":
                names = {".".join(item.nested_key) or item.key for item in record.history.item}
                found.append((record.history.step.num, {name for name in names if not name.startswith("_")}))
    assert ids == {(run_dir / "wandb_id").read_text().strip()}
    return sorted(found, key=lambda item: item[0])


def test_a_resumed_run_sends_no_step_that_wandb_has(tmp_path: Path) -> None:
    interrupted(tmp_path, range(5))
    interrupted(tmp_path, range(2, 4))  # stopped before the last step sent
    interrupted(tmp_path, range(3, 8))
    assert [step for step, _ in sent(tmp_path)] == list(range(8))
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [*range(8)]


def test_tables_of_samples_are_sent_with_their_steps(tmp_path: Path) -> None:
    interrupted(tmp_path, range(5))
    interrupted(tmp_path, range(3, 7))
    with_table = [step for step, names in sent(tmp_path) if any(name.startswith("samples") for name in names)]
    assert with_table == [1, 3, 4, 5, 6]  # every second step, and the last step of each start
    assert all("entropy" in names for _, names in sent(tmp_path))


def test_a_killed_run_resumes_with_the_first_unsent_step(tmp_path: Path) -> None:
    script = f"from tests.driver.test_tracking import *; log_steps(Path({str(tmp_path)!r}), range(4), killed=True)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -signal.SIGKILL
    interrupted(tmp_path, range(2, 6))
    steps = [step for step, _ in sent(tmp_path)]
    assert len(set(steps)) == len(steps)
    assert steps[-3:] == [3, 4, 5]  # of the earlier steps, wandb keeps those that its service process had written


def test_a_fresh_start_in_the_same_folder_is_a_new_wandb_run(tmp_path: Path) -> None:
    interrupted(tmp_path, range(3))
    first = (tmp_path / "wandb_id").read_text()
    for old in (tmp_path / "wandb").glob("offline-run-*"):
        old.rename(tmp_path / old.name)
    interrupted(tmp_path, range(2))
    assert (tmp_path / "wandb_id").read_text() != first
    assert [step for step, _ in sent(tmp_path)] == [0, 1]
