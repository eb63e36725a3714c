"""This system's side: a run as a person would start it, read from its metrics."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from othink_ray.bench.times import WARM_UP
from othink_ray.bench.turns import Program, Timed
from othink_ray.bench.work import Work
from othink_ray.config.load import read
from othink_ray.config.model_rules import base_model_folder
from othink_ray.runtime.placement import PROCESS_ENVIRONMENT
from othink_ray.study.launch import end

# Half a minute in the first step of each run, which does not count; it needs a compiler, as the peer does.
FAST = ("learner.compile=true",) if shutil.which("g++") else ()
_UNTIL_STOPPED = 10**6
_PATIENCE_S = 3600


class BenchError(RuntimeError):
    """A side did not finish its work; the message ends with what it said last."""


def run(command: Sequence[str], log: Path, environment: dict[str, str] | None = None) -> None:
    """To its end, or to ours: an interrupted one is given the time to clean up."""
    process = _start(command, log, environment)
    try:
        _expect_success(process.wait(), command, log)
    finally:
        end([process])


def _start(command: Sequence[str], log: Path, environment: dict[str, str] | None) -> subprocess.Popen[bytes]:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as screen:
        return subprocess.Popen(
            list(command),
            stdout=screen,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
        )


def _expect_success(code: int | None, command: Sequence[str], log: Path) -> None:
    if code:
        last = "\n".join(log.read_text(errors="replace").splitlines()[-5:])
        raise BenchError(f"{' '.join(command[:4])} … ended with {code}; the whole output is in {log}:\n{last}")


def train(work: Work, steps: int, folder: Path, overrides: Sequence[str]) -> list[dict[str, Any]]:
    """The metrics of `steps` steps that count."""
    own = [f"run.dir={folder}", f"train.steps={steps + WARM_UP + 1}"]  # the last one samples nothing ahead
    run(
        [sys.executable, "-m", "othink_ray.main", *work.overrides(), *own, *FAST, *overrides],
        folder.with_suffix(".txt"),
    )
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    done = [line for line in lines if "time/step_s" in line][WARM_UP:-1]
    wrong = {line["tokens/completion_mean"] for line in done} - {work.tokens}
    if wrong:
        raise BenchError(f"{folder}: answers of {sorted(wrong)} tokens on average, not {work.tokens}")
    return done


def bare(
    parts: Sequence[str], work: Work, steps: int, folder: Path, overrides: Sequence[str] = ()
) -> dict[str, list[float]]:
    """Seconds of at least `steps` steps of each engine, a process each, while all of them work."""
    logs = {part: folder.with_name(f"{folder.name}_{part}.txt") for part in parts}
    commands = {
        part: [sys.executable, "-m", "othink_ray.bench.bare", part, *work.overrides(), *FAST, *overrides]
        for part in parts
    }
    environment = {**os.environ, **PROCESS_ENVIRONMENT}
    processes = {
        part: _start([*command, f"train.steps={_UNTIL_STOPPED}"], logs[part], environment)
        for part, command in commands.items()
    }
    try:
        while True:
            for part, process in processes.items():
                _expect_success(process.poll(), commands[part], logs[part])
            found = side_by_side({part: _said(log) for part, log in logs.items()})
            if all(len(seconds) >= steps for seconds in found.values()):
                return found
            time.sleep(0.5)
    finally:
        end(list(processes.values()))


def training(work: Work, folder: Path, overrides: Sequence[str]) -> Program:
    """A run that goes on until it is ended; it may be stopped meanwhile for longer than a score should take."""
    own = [f"run.dir={folder}", f"train.steps={_UNTIL_STOPPED}", f"algo.reward.timeout_s={_PATIENCE_S}"]
    command = [sys.executable, "-m", "othink_ray.main", *work.overrides(), *own, *FAST, *overrides]
    return _program(command, folder.with_suffix(".txt"), lambda: _run_said(folder / "metrics.jsonl"), None)


def bare_training(part: str, work: Work, log: Path, overrides: Sequence[str]) -> Program:
    """One engine of it without Ray or loop."""
    own = [*FAST, *overrides, f"train.steps={_UNTIL_STOPPED}"]
    command = [sys.executable, "-m", "othink_ray.bench.bare", part, *work.overrides(), *own]
    return _program(command, log, lambda: [Timed(**step) for step in _said(log)], {**os.environ, **PROCESS_ENVIRONMENT})


def _program(
    command: Sequence[str], log: Path, said: Callable[[], Sequence[Timed]], environment: dict[str, str] | None
) -> Program:
    process = _start(command, log, environment)
    return Program(process=process, said=said, require=lambda: _expect_success(process.poll(), command, log))


def _run_said(metrics: Path) -> list[Timed]:
    lines = metrics.read_text().split("\n")[:-1] if metrics.exists() else []
    steps = [line for line in map(json.loads, lines) if "time/step_s" in line]
    return [Timed(began=one["time/unix_s"] - one["time/step_s"], seconds=one["time/step_s"]) for one in steps]


def limits(work: Work, folder: Path, overrides: Sequence[str] = ()) -> dict[str, float]:
    """Operations of one step of the learner, and how many of them this machine makes a second."""
    log = folder.with_suffix(".txt")
    command = [sys.executable, "-m", "othink_ray.bench.limits", *work.overrides(), *overrides]
    run(command, log, {**os.environ, **PROCESS_ENVIRONMENT})
    found: dict[str, float] = json.loads(log.read_text().splitlines()[-1])
    return found


def side_by_side(said: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, list[float]]:
    """Of what each said, the seconds of the steps that began when all were warm."""
    if any(len(steps) <= WARM_UP for steps in said.values()):
        return {part: [] for part in said}
    since = max(steps[WARM_UP]["began"] for steps in said.values())
    return {part: [step["seconds"] for step in steps if step["began"] >= since] for part, steps in said.items()}


def _said(log: Path) -> list[dict[str, float]]:
    """The steps in a log, the last of which may be half written, and among other talk."""
    lines = log.read_text(errors="replace").split("\n")[:-1]
    return [json.loads(line) for line in lines if line.startswith('{"began"')]


def model_folder(work: Work) -> Path:
    """The model that `train` made and trained: the peer gets the same one."""
    config, found = read(work.overrides())
    assert config is not None and not found, found
    return base_model_folder(config)
