"""The exit reporter prints a line if the driver dies, and nothing if the driver exits by itself."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
DRIVER = """
import os, signal, sys
from pathlib import Path
from othink_ray.driver.exit_reporter import ExitReporter
from tests.driver.test_exit_reporter import write_a_report
with ExitReporter(Path(sys.argv[1]), "metrics.jsonl", write_a_report, "rerun it") as reporter:
    print("at work", flush=True)
    exec(sys.stdin.read())
"""


def write_a_report(folder: Path) -> Path:
    (folder / "report.html").write_text("")
    return folder / "report.html"


def driver(folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", DRIVER, str(folder)]
    process = subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "at work\n"
    return process


@pytest.mark.parametrize(
    ("how", "line"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "stopped: its process died without an error message (killed, "),
        ("os._exit(1)", "stopped: its process died without an error message (killed, "),
        ("reporter.report('Ray is gone')\nreporter.wait()\nos._exit(1)", "stopped: Ray is gone; rerun it\n"),
        ("reporter.report('Ray is gone')", "stopped: Ray is gone; rerun it\n"),
    ],
)
@pytest.mark.parametrize("has_steps", [True, False])
def test_the_end_of_a_driver_that_cannot_report_is_reported(
    how: str, line: str, has_steps: bool, tmp_path: Path
) -> None:
    if has_steps:
        (tmp_path / "metrics.jsonl").write_text("")
    output, _ = driver(tmp_path).communicate(how, timeout=60)
    assert output.startswith(line), output
    assert (tmp_path / "report.html").exists() == has_steps == (f"partial report: {tmp_path}" in output)


@pytest.mark.parametrize("how", ["pass", "sys.exit(3)", "1 / 0"])
def test_nothing_is_reported_if_the_driver_exits_by_itself(how: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    output, _ = driver(tmp_path).communicate(how, timeout=60)
    assert "stopped" not in output
    assert not (tmp_path / "report.html").exists()


def test_signals_to_all_processes_of_a_job_do_not_end_it(tmp_path: Path) -> None:
    process = driver(tmp_path)
    [helper] = psutil.Process(process.pid).children()
    while not all(_ignores(helper.pid, number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)):
        time.sleep(0.01)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        helper.send_signal(number)
    assert process.communicate("reporter.report('reason')", timeout=60)[0] == "stopped: reason; rerun it\n"


def _ignores(pid: int, number: int) -> bool:
    ignored = re.search(r"^SigIgn:\s*(\w+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert ignored is not None
    return bool(int(ignored[1], 16) >> (number - 1) & 1)


def test_a_driver_survives_the_death_of_the_reporter(tmp_path: Path) -> None:
    process = driver(tmp_path)
    [helper] = psutil.Process(process.pid).children()
    helper.kill()
    assert process.communicate("reporter.report('reason')", timeout=60)[0] == ""
    assert process.returncode == 0


STARTS = """
import psutil, subprocess
quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
started = [subprocess.Popen(["sleep", "300"], start_new_session=True, **quiet) for _ in range(3)]
reporter.end_with_driver(psutil.Process(one.pid) for one in started[:2])
print(*(one.pid for one in started), flush=True)
"""
DEATHS = ("os.kill(os.getpid(), signal.SIGKILL)", "reporter.report('Ray is\\ngone')\nos._exit(1)")


@pytest.mark.parametrize("how", DEATHS)
def test_only_listed_processes_are_killed_with_the_driver(how: str, tmp_path: Path) -> None:
    said, _ = driver(tmp_path).communicate(STARTS + how, timeout=60)
    listed, _, other = map(int, said.splitlines()[0].split())
    assert said.splitlines()[1].startswith("stopped: ")
    with suppress(psutil.NoSuchProcess):
        psutil.Process(listed).wait(60)
    left = psutil.Process(other)
    left.kill()


def test_no_process_is_killed_at_a_clean_exit(tmp_path: Path) -> None:
    said, _ = driver(tmp_path).communicate(STARTS, timeout=60)
    for pid in map(int, said.split()):
        psutil.Process(pid).kill()


def test_a_number_that_another_process_has_now_is_left_alone(tmp_path: Path) -> None:
    bystander = subprocess.Popen(["sleep", "300"])
    line = f"reporter._write('{bystander.pid} 1.5\\n')\n"
    driver(tmp_path).communicate(line + DEATHS[0], timeout=60)
    assert bystander.poll() is None
    bystander.kill()
    bystander.wait()
