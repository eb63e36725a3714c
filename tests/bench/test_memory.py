"""The plan of mode=check against counted allocations at true widths, and what the program sees of a run's processes."""

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
from benchmarks.processes import TOGETHER, Watch, _processes, _proportional
from othink_ray.config.load import load
from othink_ray.config.validate import machine_for, problems

MIB = 2**20


@pytest.fixture(scope="module")
def shallow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen2-VL-2B with two layers in each tower: its widths, heads and vocabulary."""
    folder = tmp_path_factory.mktemp("memory")
    write_model(shape_of(2), folder / "model", torch.device("cpu"), "bfloat16")
    return folder


def test_the_plan_is_what_an_update_allocates_at_true_widths(shallow: Path) -> None:
    overrides = settings(shallow, [])
    uses = planned(load(overrides))["a learner rank"]
    found = counted(overrides, shallow / "counted.txt")
    assert found > 2 * VOCABULARY * 1536 + 4 * VOCABULARY * 1536  # the output matrix, and once more in float32
    assert sum(uses.values()) - uses["process"] == pytest.approx(found, rel=0.15)


def test_the_step_is_a_sound_run(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    config = load(settings(tmp_path, []))
    assert problems(config, machine_for(config)) == []


def test_each_process_is_seen_under_its_role() -> None:
    """A driver whose child bears a name as Ray gives it, and holds 200 MiB."""
    child = "import time; held = bytearray(b'x') * (200 << 20); time.sleep(3)"
    command = ["ray::LearnerActor.update", "-c", child]
    started = f"import subprocess; subprocess.run({command!r}, executable={sys.executable!r})"
    watch = Watch()
    driver = subprocess.Popen([sys.executable, "-c", started])
    with watch.of(driver.pid):
        assert driver.wait() == 0
    peaks = watch.peaks(0, time.time())
    assert peaks["learner"] > 200 * MIB
    assert peaks["driver"] < 50 * MIB
    assert peaks[TOGETHER] >= peaks["learner"] + peaks["driver"] / 2
    assert watch.peaks(0, 1) == {TOGETHER: 0}


def test_phases_are_placed_by_the_last_evaluation() -> None:
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


def test_the_table_sets_what_was_planned_beside_what_was_counted() -> None:
    gib = 2**30
    run = {"held": {"update": {"learner": 3 * gib, TOGETHER: 4 * gib}}, "seconds": {"update": 5.0}, "step": {"lr": 1}}
    uses = {"process": 0.9 * gib, "weights": 2.2 * gib}
    text = table({"run": run, "planned": {"a learner rank": uses}, "counted": 2 * gib})
    assert "learner, planned 2.20, counted 2.00: +10.0%" in text
    assert ["learner", "3.00"] in [line.split() for line in text.splitlines()]


def test_a_run_that_fails_leaves_the_log_its_message_names(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model goes: it is gigabytes."""

    def failing(folder: Path, *_: object) -> None:
        (folder / "model").mkdir()
        (folder / "run.txt").write_text("out of memory")
        raise BenchError(f"the whole output is in {folder / 'run.txt'}")

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(memory, "measured", failing)
    assert memory.main([]) == 1
    log = Path(capsys.readouterr().err.split(" is in ")[1].strip())
    assert log.read_text() == "out of memory"
    assert not (log.parent / "model").exists()


def test_a_process_that_has_ended_holds_nothing() -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    assert list(_processes(ended.pid)) == []
    assert _proportional(ended.pid) == 0
