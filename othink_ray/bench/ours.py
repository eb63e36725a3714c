"""This system's side: a run as a person would start it, read from its metrics."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from othink_ray.bench.times import WARM_UP
from othink_ray.bench.work import Work
from othink_ray.config.load import read
from othink_ray.driver.warm_start import base_model_folder
from othink_ray.runtime.placement import PROCESS_ENVIRONMENT
from othink_ray.study.launch import end

# Half a minute in the first step of each run, which does not count; it needs a compiler, as the peer does.
FAST = ("learner.compile=true",) if shutil.which("g++") else ()


class BenchError(RuntimeError):
    """A side did not finish its work; the message ends with what it said last."""


def run(command: Sequence[str], log: Path, environment: dict[str, str] | None = None) -> None:
    """To its end, or to ours: an interrupted one is given the time to clean up."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as screen:
        process = subprocess.Popen(
            list(command),
            stdout=screen,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
        )
    try:
        code = process.wait()
    finally:
        end([process])
    if code:
        last = "\n".join(log.read_text(errors="replace").splitlines()[-5:])
        raise BenchError(f"{' '.join(command[:3])} … ended with {code}; the whole output is in {log}:\n{last}")


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


def bare(part: str, work: Work, steps: int, folder: Path, overrides: Sequence[str] = ()) -> list[float]:
    """Seconds of `steps` turns of one engine alone in a process: `generate` or `learn`."""
    command = [sys.executable, "-m", "othink_ray.bench.bare", part, *work.overrides(), f"train.steps={steps + WARM_UP}"]
    log = folder.with_suffix(".txt")
    run([*command, *FAST, *overrides], log, {**os.environ, **PROCESS_ENVIRONMENT})
    seconds: list[float] = json.loads(log.read_text().splitlines()[-1])
    return seconds[WARM_UP:]


def model_folder(work: Work) -> Path:
    """The model that `train` made and trained: the peer gets the same one."""
    config, found = read(work.overrides())
    assert config is not None and not found, found
    return base_model_folder(config)
