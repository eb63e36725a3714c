"""Checkpoints in `checkpoints/step_N/`: learner shards and driver state, written to a temporary folder and renamed."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from othink_ray.atomic_write import atomic_write
from othink_ray.config.load import to_yaml
from othink_ray.config.retired import modernized
from othink_ray.config.schema import Config
from othink_ray.tracing import span
from othink_ray.types import TrainState

_STATE, _DIGESTS, _UNFINISHED = "state.json", "digests.json", ".partial"
_LOCATION_KEYS = ("run.", "wandb.", "cluster.")  # where a run executes and writes; a change does not affect its results
_ADAPTER_KEYS = ("model.path", "model.tiny.", "learner.lora.")


class ResumeError(ValueError):
    """The run cannot resume from this checkpoint."""


class Saves(Protocol):
    """A learner that writes its state in the background."""

    def save(self, folder: Path) -> None:
        """Begin to write the current weights and optimizer states."""
        ...

    def save_is_written(self) -> bool:
        """Return whether all files are written."""
        ...

    def finish_save(self) -> dict[str, str]:
        """Wait for all files; return the SHA-256 of each."""
        ...


class Checkpoints:
    """The checkpoints of one run; the learner writes in the background, and `finish` renames the complete folder."""

    def __init__(
        self, run_dir: Path, learner: Saves, *, keep_last: int, keep_best: bool, log: Callable[[str], None]
    ) -> None:
        self.folder, self.learner, self.log = run_dir / "checkpoints", learner, log
        self.keep_last, self.keep_best = keep_last, keep_best
        self.begun: Path | None = None
        for partial in self.folder.glob(f"step_*{_UNFINISHED}"):  # left by a run that was killed
            shutil.rmtree(partial)

    @span("begin a checkpoint")
    def begin(self, state: TrainState) -> None:
        self.finish()
        partial = self.folder / f"step_{state.step}{_UNFINISHED}"
        with self._tolerate_io_errors(partial):
            partial.mkdir(parents=True)
            atomic_write(partial / _STATE, json.dumps(asdict(state), indent=2) + "\n")
            self.learner.save(partial)
            self.begun = partial

    def finish_if_written(self) -> None:
        if self.begun is not None and self.learner.save_is_written():
            self.finish()

    def finish(self) -> None:
        if self.begun is None:
            return
        partial, self.begun = self.begun, None
        with span("finish a checkpoint"), self._tolerate_io_errors(partial):
            digests = self.learner.finish_save() | {_STATE: _digest(partial / _STATE)}
            atomic_write(partial / _DIGESTS, json.dumps(digests, indent=2) + "\n")
            folder = partial.with_suffix("")
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
            self._delete_old()

    @contextmanager
    def _tolerate_io_errors(self, partial: Path) -> Iterator[None]:
        """On an OSError delete the partial checkpoint and log the error; complete ones stay, and the run continues."""
        try:
            yield
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            complete = _complete(self.folder)
            kept = f"the last complete one is {complete[-1].name}" if complete else "there is no complete one yet"
            self.log(f"checkpoint {partial.stem} could not be written ({error}): the run continues, {kept}")

    def _delete_old(self) -> None:
        complete = _complete(self.folder)
        kept = set(complete[-self.keep_last :])
        if self.keep_best:
            kept |= {best for best in [self._best(complete)] if best}
        for folder in set(complete) - kept:
            shutil.rmtree(folder)

    @staticmethod
    def _best(complete: Sequence[Path]) -> Path | None:
        """Return the checkpoint of highest held-out accuracy, the latest of equal ones; None if none was evaluated."""
        accuracies = {folder: _state_of(folder).accuracy for folder in complete}
        known = {folder: accuracy for folder, accuracy in accuracies.items() if accuracy is not None}
        return max(known, key=lambda folder: (known[folder], _step(folder)), default=None)


def find(run_dir: Path, resume: str, seed: int, log: Callable[[str], None]) -> tuple[Path | None, TrainState]:
    """Return the checkpoint that `run.resume` selects, with its state; None and the initial state for a fresh start.

    `auto` logs and skips damaged checkpoints; a checkpoint given by path must be intact.
    """
    if resume not in ("auto", "never"):
        return Path(resume), read(Path(resume), seed)
    for folder in reversed(_complete(run_dir / "checkpoints")) if resume == "auto" else ():
        try:
            return folder, read(folder, seed)
        except DamagedError as error:
            log(f"skipping a checkpoint: {error}")
    return None, fresh(seed)


def fresh(seed: int) -> TrainState:
    """Return the initial state, before the first step."""
    return TrainState(step=0, data_position=0, schedule_state={}, seed=seed, before={}, accuracy=None)


class DamagedError(ResumeError):
    """A checkpoint's files are unreadable or differ from what was written."""


def read(folder: Path, seed: int) -> TrainState:
    """Return the driver's state of an intact checkpoint; `seed` must be the one that the run started with."""
    try:
        state = _state_of(folder)
        digests = json.loads((folder / _DIGESTS).read_text())
        changed = [name for name, digest in digests.items() if _digest(folder / name) != digest]
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise DamagedError(
            f"run.resume: {folder} holds no readable checkpoint ({type(error).__name__}: {error}); give a "
            "checkpoints/step_N folder, or set run.resume=never for a fresh start"
        ) from error
    if changed:
        raise DamagedError(
            f"run.resume: {folder} is damaged: {', '.join(changed)} does not match its digest; give an older "
            "checkpoints/step_N folder, or set run.resume=never for a fresh start"
        )
    if state.seed != seed:
        raise ResumeError(
            f"train.seed = {seed}, but {folder} was made with train.seed = {state.seed}: data order and samples would "
            f"differ from those of the original run. Set train.seed={state.seed}."
        )
    return state


def _complete(checkpoints: Path) -> list[Path]:
    """Return the finished checkpoint folders, sorted by step."""
    return sorted((path for path in checkpoints.glob("step_*") if path.suffix != _UNFINISHED), key=_step)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def _state_of(folder: Path) -> TrainState:
    return TrainState(**json.loads((folder / _STATE).read_text()))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def compare_settings(checkpoint: Path, config: Config, log: Callable[[str], None]) -> None:
    """Log settings that differ from the checkpoint's config.yaml, if any; raise if one invalidates its adapters."""
    file = checkpoint.parent.parent / "config.yaml"
    if not file.exists():
        return
    changed = dict(differences(file.read_text(), to_yaml(config)))
    if config.learner.lora.rank:
        for key in changed:
            if key.startswith(_ADAPTER_KEYS):
                raise ResumeError(
                    f"run.resume: {checkpoint} holds adapters, which are not valid with another {key} "
                    f"({changed[key]}): restore the old value, or start from the run's export with model.path"
                )
    if changed:
        text = ", ".join(f"{key} {change}" for key, change in changed.items())
        log(f"resuming with changed settings: {text}")


def differences(before: str, now: str) -> Iterator[tuple[str, str]]:
    """Yield each changed key with "old -> new", except keys of one side only and those that cannot change results.

    `before` may be of an older version: renamed keys are compared under their new names.
    """
    from omegaconf import OmegaConf

    old, new = (modernized(dict(_flat(OmegaConf.to_container(OmegaConf.create(text))))) for text in (before, now))
    for key in new:
        if key in old and old[key] != new[key] and not key.startswith(_LOCATION_KEYS):
            yield key, f"{old[key]} -> {new[key]}"


def _flat(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
