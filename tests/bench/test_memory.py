"""The plan of mode=check against counted allocations at real widths, and the memory of a run's processes."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

from benchmarks import memory
from benchmarks.gpu.shapes import VOCABULARY, write_model
from benchmarks.memory import _windows, counted, planned, settings, shape_of, table
from benchmarks.ours import BenchError
from benchmarks.processes import TOGETHER, MemoryMonitor, _processes, _proportional
from othink_ray.config.load import load
from othink_ray.config.validate import machine_for, problems

MIB = 2**20


@pytest.fixture(scope="module")
def shallow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen2-VL-2B with two layers in each tower: its widths, heads and vocabulary."""
    folder = tmp_path_factory.mktemp("memory")
    write_model(shape_of(2), folder / "model", torch.device("cpu"), "bfloat16")
    return folder


@pytest.mark.slow
def test_the_memory_plan_matches_the_counted_allocations(shallow: Path) -> None:
    overrides = settings(shallow, [])
    uses = planned(load(overrides))["a learner rank"]
    allocated = counted(overrides, shallow / "counted.txt")
    assert allocated > 2 * VOCABULARY * 1536 + 4 * VOCABULARY * 1536  # the output matrix, and its float32 copy
    assert sum(uses.values()) - uses["process"] == pytest.approx(allocated, rel=0.15)


def test_the_step_is_a_valid_run(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    config = load(settings(tmp_path, []))
    assert problems(config, machine_for(config)) == []


def test_each_process_is_counted_under_its_role() -> None:
    """A driver whose child has a title as Ray sets it, and holds 200 MiB."""
    child = "import time; held = bytearray(b'x') * (200 << 20); time.sleep(3)"
    command = ["ray::LearnerActor.update", "-c", child]
    started = f"import subprocess; subprocess.run({command!r}, executable={sys.executable!r})"
    monitor = MemoryMonitor()
    driver = subprocess.Popen([sys.executable, "-c", started])
    with monitor.of(driver.pid):
        assert driver.wait() == 0
    peaks = monitor.peaks(0, time.time())
    assert peaks["learner"] > 200 * MIB
    assert peaks["driver"] < 50 * MIB
    assert peaks[TOGETHER] >= peaks["learner"] + peaks["driver"] / 2
    assert monitor.peaks(0, 1) == {TOGETHER: 0}


def test_phases_are_aligned_by_the_last_evaluation() -> None:
    spans = [("push", 1, 2), ("evaluate", 3, 1), ("score", 5, 2), ("update", 7, 3), ("push", 10, 1)]
    spans += [("evaluate", 12, 3), ("export", 20, 5)]
    events = [{"ph": "X", "name": name, "ts": 1e6 * start, "dur": 1e6 * lasts} for name, start, lasts in spans]
    assert _windows(events, ended_s=1015.0) == {
        "load": (0.0, 1001.0),
        "first push": (1001.0, 1003.0),
        "generate": (1005.0, 1007.0),
        "update": (1007.0, 1010.0),
        "push": (1010.0, 1011.0),
        "export": (1020.0, 1025.0),
    }


def test_the_table_compares_plan_and_count() -> None:
    gib = 2**30
    run = {"held": {"update": {"learner": 3 * gib, TOGETHER: 4 * gib}}, "seconds": {"update": 5.0}, "step": {"lr": 1}}
    uses = {"process": 0.9 * gib, "weights": 2.2 * gib}
    text = table({"run": run, "planned": {"a learner rank": uses}, "counted": 2 * gib})
    assert "learner, planned 2.20, counted 2.00: +10.0%" in text
    assert ["learner", "3.00"] in [line.split() for line in text.splitlines()]


def test_a_failed_run_keeps_the_log_its_message_names(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model, which takes gigabytes, is removed."""

    def failing(folder: Path, *_: object) -> None:
        (folder / "model").mkdir()
        (folder / "run.txt").write_text("out of memory")
        raise BenchError(f"full output in {folder / 'run.txt'}")

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(memory, "measured", failing)
    assert memory.main([]) == 1
    log = Path(capsys.readouterr().err.split(" output in ")[1].strip())
    assert log.read_text() == "out of memory"
    assert not (log.parent / "model").exists()


def test_a_process_that_has_exited_counts_as_zero() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    assert list(_processes(process.pid)) == []
    assert _proportional(process.pid) == 0
