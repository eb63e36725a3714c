"""`checkpoints/step_N/`: the learner's shards and the driver's state, written aside and renamed when whole."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

from othink_ray.types import TrainState

_STATE = "state.json"


class ResumeError(ValueError):
    """The checkpoint does not belong to this run."""


class Saves(Protocol):
    def save(self, folder: Path) -> None: ...


def write(run_dir: Path, state: TrainState, learner: Saves) -> Path:
    """A checkpoint after `state.step` steps."""
    folder = run_dir / "checkpoints" / f"step_{state.step}"
    aside = folder.with_name(folder.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    learner.save(aside)
    (aside / _STATE).write_text(json.dumps(asdict(state), indent=2) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)
    return folder


def find(run_dir: Path, resume: str) -> Path | None:
    """The checkpoint that `run.resume` means; None to start afresh."""
    if resume == "never":
        return None
    if resume != "auto":
        return Path(resume)
    whole = [path for path in (run_dir / "checkpoints").glob("step_*") if path.suffix != ".partial"]
    return max(whole, key=lambda path: int(path.name.removeprefix("step_")), default=None)


def fresh(seed: int) -> TrainState:
    """Nothing done yet."""
    return TrainState(step=0, data_position=0, schedule_state={}, seed=seed, before={})


def read(folder: Path, seed: int) -> TrainState:
    """The driver's state of a checkpoint; the run must go on with the seed it began with."""
    try:
        state = TrainState(**json.loads((folder / _STATE).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ResumeError(
            f"run.resume: {folder} holds no checkpoint that can be read ({type(error).__name__}: {error}); name a "
            "checkpoints/step_N folder, or set run.resume=never to start afresh"
        ) from error
    if state.seed != seed:
        raise ResumeError(
            f"train.seed = {seed}, but {folder} was made with train.seed = {state.seed}: data order and samples would "
            f"differ from the run it continues. Set train.seed={state.seed}."
        )
    return state
