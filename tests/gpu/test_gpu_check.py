"""The GPU check's engine and learner on this machine: vLLM's weight transfer between processes."""

from __future__ import annotations

import dataclasses
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import colocated, engine_process
from benchmarks.gpu.rows import Row
from benchmarks.gpu.setup import Setup
from tests.bench.test_gpu_check import TOY
from tests.gpu import fake_device
from tests.gpu.colocated_check import rehearse

pytestmark = pytest.mark.slow


@pytest.fixture
def setup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Setup:
    monkeypatch.setenv(fake_device.FOLDER, str(tmp_path))
    monkeypatch.setattr(engine_process, "serve_engine", fake_device.serve)
    return Setup(
        folder=tmp_path,
        device=torch.device("cpu"),
        dtype="float32",
        name="toy",
        shapes={"toy": TOY},
        sides=(56,),
        tokens=(8,),
        answers=3,
        prompts=2,
        groups=2,
        steps=1,
        colocated_steps=2,
        push_s=60.0,
        engine={"gpus_per_actor": 0, "max_model_len": 128, "max_num_seqs": 8, "enforce_eager": True, "threads": 1},
    )


@pytest.mark.parametrize(("part", "transport"), [("colocated", "ipc"), ("apart", "nccl")])
def test_the_deepspeed_learner_passes_the_gpu_checks_audit(setup: Setup, part: str, transport: str) -> None:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as alone:
        records = alone.submit(rehearse, dataclasses.replace(setup, colocated_steps=1), part).result()
    assert [record for record in records if record["state"] != "ok"] == []
    figures = {record["setting"]: record["figures"] for record in records}
    assert float(figures[f"{transport}: worst of 1 audits"]["gap max"]) < 1e-5
    if part == "apart":
        before = figures["audit before the push"]["gap mean"]
        assert float(before) > 100 * float(figures["nccl: worst of 1 audits"]["gap mean"])


def by_setting(rows: list[Row]) -> dict[str, Row]:
    assert [row for row in rows if row.state != "ok"] == []
    return {row.setting: row for row in rows}


def test_the_colocated_part_pushes_by_ipc_and_sleeps(setup: Setup) -> None:
    with fake_device.device():
        rows = by_setting(list(colocated.colocated(setup)))
    assert float(rows["first push by ipc"].figures["gap max"]) < 1e-5
    assert float(rows["ipc: worst of 2 audits"].figures["gap max"]) < 1e-5
    assert set(rows["ipc: seconds per step, 2 x 3 answers"].figures) == set(colocated.PARTS)


def test_the_part_of_two_gpus_pushes_by_nccl(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with fake_device.device():
        rows = by_setting(list(colocated.apart(dataclasses.replace(setup, colocated_steps=1))))
    before, after = rows["audit before the push"], rows["nccl: worst of 1 audits"]
    assert float(after.figures["gap max"]) < 1e-5
    assert float(before.figures["gap mean"]) > 100 * float(after.figures["gap mean"])
