"""This system's side: a run as a person would start it, read from its metrics."""

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
from benchmarks.turns import Program, Timed, in_turn
from benchmarks.work import Work
from othink_ray.config.load import read
from othink_ray.config.model_rules import base_model_folder
from othink_ray.runtime.placement import PROCESS_ENVIRONMENT
from othink_ray.study.launch import end

# Half a minute in the first step of each run, which does not count; it needs a compiler, as the peer does.
_COMPILES = shutil.which("g++") is not None
FAST = ("learner.compile=true",) if _COMPILES else ()
FAST_ENGINE = ("rollout.enforce_eager=false",) if _COMPILES else ()  # quicker on one thread, not on two
_UNTIL_STOPPED = 10**6
_PATIENCE_S = 3600


class BenchError(RuntimeError):
    """A side did not finish its work; the message ends with what it said last."""


def run(
    command: Sequence[str],
    log: Path,
    environment: dict[str, str] | None = None,
    watch: Callable[[int], AbstractContextManager[Any]] = nullcontext,
) -> None:
    """Run a command to its end, in the context of `watch(its process id)`; interrupted, give it time to clean up."""
    process = _start(command, log, environment)
    try:
        with watch(process.pid):
            code = process.wait()
        _expect_success(code, command, log)
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
    own = f"train.steps={steps + WARM_UP + 1}"  # the last one samples nothing ahead
    run(_command(work, folder, own, *overrides), folder.with_suffix(".txt"))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    done = [line for line in lines if "time/step_s" in line][WARM_UP:-1]
    wrong = {line["tokens/completion_mean"] for line in done} - {work.tokens}
    if wrong:
        raise BenchError(f"{folder}: answers of {sorted(wrong)} tokens on average, not {work.tokens}")
    return done


def _command(work: Work, folder: Path, *overrides: str) -> list[str]:
    return [sys.executable, "-m", "othink_ray.main", *work.overrides(), f"run.dir={folder}", *FAST, *overrides]


def bare(
    parts: Sequence[str], work: Work, steps: int, folder: Path, overrides: Sequence[str] = ()
) -> dict[str, list[float]]:
    """Seconds of at least `steps` steps of each engine, a process each, while all of them work."""
    side = {part: bare_training(part, work, folder.with_name(f"{folder.name}_{part}.txt"), overrides) for part in parts}
    return in_turn([side], turns=1, steps=steps)[0]


def training(work: Work, folder: Path, overrides: Sequence[str]) -> Program:
    """A run that goes on until it is ended; it may be stopped meanwhile for longer than a score should take."""
    own = [f"train.steps={_UNTIL_STOPPED}", f"algo.reward.timeout_s={_PATIENCE_S}"]
    command = _command(work, folder, *own, *overrides)
    return _program(command, folder.with_suffix(".txt"), lambda: _run_said(folder / "metrics.jsonl"), None)


def bare_training(part: str, work: Work, log: Path, overrides: Sequence[str]) -> Program:
    """One engine of it without Ray or loop."""
    own = [*FAST, *overrides, f"train.steps={_UNTIL_STOPPED}"]
    command = [sys.executable, "-m", "benchmarks.bare", part, *work.overrides(), *own]
    return _program(command, log, lambda: _said(log), {**os.environ, **PROCESS_ENVIRONMENT})


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
    command = [sys.executable, "-m", "benchmarks.limits", *work.overrides(), *overrides]
    run(command, log, {**os.environ, **PROCESS_ENVIRONMENT})
    found: dict[str, float] = json.loads(log.read_text().splitlines()[-1])
    return found


def _said(log: Path) -> list[Timed]:
    """The steps in a log, the last of which may be half written, and among other talk."""
    lines = log.read_text(errors="replace").split("\n")[:-1]
    return [Timed(**json.loads(line)) for line in lines if line.startswith('{"began"')]


def model_folder(work: Work) -> Path:
    """The model that `train` made and trained: the peer gets the same one."""
    config, found = read(work.overrides())
    assert config is not None and not found, found
    return base_model_folder(config)
