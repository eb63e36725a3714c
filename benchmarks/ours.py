"""This system: runs started by its command line and read from their metrics, and processes of single engines."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from benchmarks.times import WARM_UP
from benchmarks.turns import Program, TimedStep, in_turn
from benchmarks.work import Workload
from othink_ray.config.load import read
from othink_ray.config.model_rules import base_model_folder
from othink_ray.runtime.placement import PROCESS_ENVIRONMENT
from othink_ray.study.launch import stop_processes

# Compilation takes half a minute in the first step, which is warm-up; like the peer's, it needs a C++ compiler.
_COMPILES = shutil.which("g++") is not None
FAST = ("learner.compile=true",) if _COMPILES else ()
FAST_ENGINE = ("rollout.enforce_eager=false",) if _COMPILES else ()  # faster on one thread, not on two
_UNTIL_STOPPED = 10**6  # steps
_REWARD_TIMEOUT_S = 3600


class BenchError(RuntimeError):
    """A benchmarked process failed; the message ends with the last lines of its output."""


def run(
    command: Sequence[str],
    log: Path,
    environment: dict[str, str] | None = None,
    watch: Callable[[int], AbstractContextManager[Any]] = nullcontext,
) -> None:
    """Run a command to its end, in the context of `watch(pid)`; on an interrupt, let it clean up first."""
    process = _start(command, log, environment)
    try:
        with watch(process.pid):
            code = process.wait()
        _require_success(code, command, log)
    finally:
        stop_processes([process])


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


def _require_success(code: int | None, command: Sequence[str], log: Path) -> None:
    if code:
        last = "\n".join(log.read_text(errors="replace").splitlines()[-5:])
        raise BenchError(f"{' '.join(command[:4])} … exited with status {code}; full output in {log}:\n{last}")


def train(work: Workload, steps: int, folder: Path, overrides: Sequence[str]) -> list[dict[str, Any]]:
    """Return the metrics of `steps` steps after the warm-up."""
    length = f"train.steps={steps + WARM_UP + 1}"  # the last step is dropped: it generates nothing ahead
    run(_command(work, folder, length, *overrides), folder.with_suffix(".txt"))
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timed = [record for record in records if "time/step_s" in record][WARM_UP:-1]
    wrong = {record["tokens/completion_mean"] for record in timed} - {work.tokens}
    if wrong:
        raise BenchError(f"{folder}: mean answer length is {sorted(wrong)} tokens, must be {work.tokens}")
    return timed


def _command(work: Workload, folder: Path, *overrides: str) -> list[str]:
    return [sys.executable, "-m", "othink_ray.main", *work.overrides(), f"run.dir={folder}", *FAST, *overrides]


def bare(
    parts: Sequence[str], work: Workload, steps: int, folder: Path, overrides: Sequence[str] = ()
) -> dict[str, list[float]]:
    """Return the seconds of at least `steps` steps of each engine, a process each, all running at the same time."""
    side = {part: bare_training(part, work, folder.with_name(f"{folder.name}_{part}.txt"), overrides) for part in parts}
    return in_turn([side], turns=1, steps=steps)[0]


def training(work: Workload, folder: Path, overrides: Sequence[str]) -> Program:
    """Start a run that trains until terminated; its reward timeout tolerates suspension between turns."""
    endless = [f"train.steps={_UNTIL_STOPPED}", f"algo.reward.timeout_s={_REWARD_TIMEOUT_S}"]
    command = _command(work, folder, *endless, *overrides)
    return _program(command, folder.with_suffix(".txt"), lambda: _steps_of_run(folder / "metrics.jsonl"), None)


def bare_training(part: str, work: Workload, log: Path, overrides: Sequence[str]) -> Program:
    """Start one engine of a training run alone, without Ray or the loop."""
    endless = [*FAST, *overrides, f"train.steps={_UNTIL_STOPPED}"]
    command = [sys.executable, "-m", "benchmarks.bare", part, *work.overrides(), *endless]
    return _program(command, log, lambda: _steps_in_log(log), {**os.environ, **PROCESS_ENVIRONMENT})


def _program(
    command: Sequence[str], log: Path, steps: Callable[[], Sequence[TimedStep]], environment: dict[str, str] | None
) -> Program:
    process = _start(command, log, environment)
    return Program(process=process, steps=steps, require_running=lambda: _require_success(process.poll(), command, log))


def _steps_of_run(metrics: Path) -> list[TimedStep]:
    lines = metrics.read_text().split("\n")[:-1] if metrics.exists() else []
    steps = [record for record in map(json.loads, lines) if "time/step_s" in record]
    return [TimedStep(began=step["time/unix_s"] - step["time/step_s"], seconds=step["time/step_s"]) for step in steps]


def limits(work: Workload, folder: Path, overrides: Sequence[str] = ()) -> dict[str, float]:
    """Return the FLOPs of one learner step, and the FLOP/s of this machine."""
    log = folder.with_suffix(".txt")
    command = [sys.executable, "-m", "benchmarks.limits", *work.overrides(), *overrides]
    run(command, log, {**os.environ, **PROCESS_ENVIRONMENT})
    rates: dict[str, float] = json.loads(log.read_text().splitlines()[-1])
    return rates


def _steps_in_log(log: Path) -> list[TimedStep]:
    """Return the steps in a log with other output; the last line may be incomplete."""
    lines = log.read_text(errors="replace").split("\n")[:-1]
    return [TimedStep(**json.loads(line)) for line in lines if line.startswith('{"began"')]


def model_folder(work: Workload) -> Path:
    """Return the folder of the model that `train` starts from; the peer gets the same one."""
    config, problems = read(work.overrides())
    assert config is not None and not problems, problems
    return base_model_folder(config)
