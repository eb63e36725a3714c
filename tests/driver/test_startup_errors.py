"""The command line before Ray starts: refused folders, unprintable row names, early signals."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from othink_ray.driver.run_dir import lock_run_dir
from tests.data.files import picture, write_jsonl

ROOT = Path(__file__).resolve().parents[2]


def output_of(*overrides: str, status: int) -> str:
    completed = subprocess.run(
        [sys.executable, "-m", "othink_ray.main", *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        timeout=120,
        check=False,
    )
    assert completed.returncode == status, completed.stdout
    assert "Traceback" not in completed.stdout and "starting Ray" not in completed.stdout, completed.stdout
    return completed.stdout


@pytest.mark.parametrize("mode", ["train", "sft", "eval"])
def test_the_folder_of_another_run_is_refused_and_unchanged(mode: str, tmp_path: Path) -> None:
    for name in ("metrics.jsonl", "evaluation.json", "report.html", "config.yaml"):
        (tmp_path / name).write_text("the other run's")
    with lock_run_dir(tmp_path):
        before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
        lines = output_of(f"mode={mode}", f"run.dir={tmp_path}", status=1).splitlines()
        assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir() if path.name != ".lock"} == {
            name: time for name, time in before.items() if name != ".lock"
        }
    reason = "in use by another run; wait until that run ends, or set another run.dir"
    assert lines == [f"stopped: run.dir = {tmp_path}: {reason}"]


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    [line] = output_of(f"run.dir={tmp_path / 'file' / 'run'}", status=1).splitlines()
    assert line.startswith("stopped: run.dir = ") and "cannot be written (Not a directory)" in line


def test_check_mode_prints_no_control_character_of_a_rows_name(tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(picture(1))
    good = {"image": "1.png", "problem": "How many?", "solution": "3", "id": "one"}
    rows = write_jsonl(tmp_path / "rows.jsonl", [good, good | {"image": "2.png", "id": "\x1b[2J\x07red"}])
    columns = {"image": "image", "question": "problem", "answer": "solution", "id": "id"}
    settings = {"source": "jsonl", "files.path": str(rows)}
    settings |= {f"files.columns.{use}": column for use, column in columns.items()}
    parts = [f"data.{split}.{key}={value}" for split in ("train", "test") for key, value in settings.items()]
    output = output_of("mode=check", "data=custom", f"run.cache_dir={tmp_path}", *parts, status=0)
    assert " bad, such as custom/train/\N{REPLACEMENT CHARACTER}[2J\N{REPLACEMENT CHARACTER}red: " in output
    assert not any(character in output for character in "\x1b\x07")


@pytest.mark.parametrize("mode", ["check", "train", "eval", "study"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_early_signal_ends_it_without_a_traceback(number: signal.Signals, mode: str, tmp_path: Path) -> None:
    folders = (f"run.dir={tmp_path / 'run'}", f"run.cache_dir={tmp_path}")
    with subprocess.Popen(
        [sys.executable, "-m", "othink_ray.main", f"mode={mode}", *folders],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as command:
        while command.poll() is None and not _handles_sigterm(command.pid):
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.3 if mode == "check" else 1.5))
        command.send_signal(number)
        output, _ = command.communicate(timeout=90)
    shown = output.decode()
    assert command.returncode == 128 + number, shown
    assert "interrupted" in shown and "Traceback" not in shown, shown


def test_a_signal_ends_all_runs_of_a_sweep(tmp_path: Path) -> None:
    with _started("-m", "train.seed=0,1", f"run.dir={tmp_path / 'runs'}", f"run.cache_dir={tmp_path}") as command:
        assert command.stdout is not None
        output = b""
        while b"starting Ray" not in output and command.poll() is None:
            output += command.stdout.readline()
        command.send_signal(signal.SIGTERM)
        output += command.communicate(timeout=90)[0]
    shown = output.decode()
    assert command.returncode == 143 and "interrupted" in shown, shown
    assert "Traceback" not in shown, shown
    assert [path.name for path in (tmp_path / "runs").iterdir() if path.is_dir()] == ["0"]


@pytest.mark.parametrize(("terminal", "number"), [(False, signal.SIGINT), (True, signal.SIGHUP)])
def test_a_closed_pipe_or_terminal_does_not_change_the_end(terminal: bool, number: int, tmp_path: Path) -> None:
    reader, writer = os.openpty() if terminal else os.pipe()
    with _started(f"run.dir={tmp_path / 'run'}", f"run.cache_dir={tmp_path}", stdout=writer) as command:
        os.close(writer)
        while b"starting Ray" not in os.read(reader, 1000):
            pass
        os.close(reader)
        command.send_signal(number)
        assert command.wait(90) == 130


def _started(*overrides: str, stdout: int = subprocess.PIPE) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "othink_ray.main", *overrides]
    return subprocess.Popen(
        command,
        stdout=stdout,
        stderr=subprocess.STDOUT,
        cwd=ROOT,
        env=os.environ | {"CI": "true"},
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # under nohup it is ignored
    )


def _handles_sigterm(pid: int) -> bool:
    """Return whether the process has installed its handlers; Python itself has none for SIGTERM."""
    caught = re.search(r"^SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert caught is not None
    return bool(int(caught[1], 16) >> (signal.SIGTERM - 1) & 1)
