"""`checkpoints/step_N/`: the learner's shares and the driver's state, written aside and renamed when whole."""

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
from othink_ray.config.schema import Config
from othink_ray.tracing import span
from othink_ray.types import TrainState

_STATE, _DIGESTS, _UNFINISHED = "state.json", "digests.json", ".partial"


class ResumeError(ValueError):
    """The checkpoint does not belong to this run."""


class Saves(Protocol):
    def save(self, folder: Path) -> None:
        """Begin to write the weights and the optimiser as they are now."""
        ...

    def written(self) -> bool:
        """Whether it is done."""
        ...

    def saved(self) -> dict[str, str]:
        """Wait for it: the SHA-256 of each file."""
        ...


class Checkpoints:
    """Of one run. The learner writes while the run goes on; a checkpoint counts from when `finish` has renamed it."""

    def __init__(
        self, run_dir: Path, learner: Saves, *, keep_last: int, keep_best: bool, tell: Callable[[str], None]
    ) -> None:
        self.folder, self.learner, self.tell = run_dir / "checkpoints", learner, tell
        self.keep_last, self.keep_best = keep_last, keep_best
        self.begun: Path | None = None
        for left in self.folder.glob(f"step_*{_UNFINISHED}"):  # by a run that was killed
            shutil.rmtree(left)

    @span("begin a checkpoint")
    def begin(self, state: TrainState) -> None:
        self.finish()
        aside = self.folder / f"step_{state.step}{_UNFINISHED}"
        with self._going_on_without(aside):
            aside.mkdir(parents=True)
            atomic_write(aside / _STATE, json.dumps(asdict(state), indent=2) + "\n")
            self.learner.save(aside)
            self.begun = aside

    def finish_if_written(self) -> None:
        if self.begun is not None and self.learner.written():
            self.finish()

    def finish(self) -> None:
        if self.begun is None:
            return
        aside, self.begun = self.begun, None
        with span("finish a checkpoint"), self._going_on_without(aside):
            digests = self.learner.saved() | {_STATE: _digest(aside / _STATE)}
            atomic_write(aside / _DIGESTS, json.dumps(digests, indent=2) + "\n")
            folder = aside.with_suffix("")
            shutil.rmtree(folder, ignore_errors=True)
            aside.rename(folder)
            self._forget_old()

    @contextmanager
    def _going_on_without(self, aside: Path) -> Iterator[None]:
        """A checkpoint that finds no room is told; the last whole one stays, and so does the run."""
        try:
            yield
        except OSError as error:
            shutil.rmtree(aside, ignore_errors=True)
            there = _whole(self.folder)
            kept = f"the last whole one is {there[-1].name}" if there else "there is none yet"
            self.tell(f"checkpoint {aside.stem} could not be written ({error}): the run goes on, {kept}")

    def _forget_old(self) -> None:
        there = _whole(self.folder)
        kept = set(there[-self.keep_last :])
        if self.keep_best:
            kept |= {best for best in [self._best(there)] if best}
        for folder in set(there) - kept:
            shutil.rmtree(folder)

    @staticmethod
    def _best(there: Sequence[Path]) -> Path | None:
        """The latest of those with the highest accuracy on held-out questions; only evaluated ones count."""
        accuracies = {folder: _state_of(folder).accuracy for folder in there}
        known = {folder: accuracy for folder, accuracy in accuracies.items() if accuracy is not None}
        return max(known, key=lambda folder: (known[folder], _step(folder)), default=None)


def find(run_dir: Path, resume: str, seed: int, tell: Callable[[str], None]) -> tuple[Path | None, TrainState]:
    """The checkpoint that `run.resume` means, with its state; None and a beginner's to start afresh.

    `auto` passes over checkpoints that are damaged, and says so; one that is asked for by name must be whole.
    """
    if resume not in ("auto", "never"):
        return Path(resume), read(Path(resume), seed)
    for folder in reversed(_whole(run_dir / "checkpoints")) if resume == "auto" else ():
        try:
            return folder, read(folder, seed)
        except DamagedError as error:
            tell(f"passed over: {error}")
    return None, fresh(seed)


def fresh(seed: int) -> TrainState:
    """Nothing done yet."""
    return TrainState(step=0, data_position=0, schedule_state={}, seed=seed, before={}, accuracy=None)


class DamagedError(ResumeError):
    """A checkpoint is not what was written."""


def read(folder: Path, seed: int) -> TrainState:
    """The driver's state of a checkpoint that is whole; the run must go on with the seed it began with."""
    try:
        state = _state_of(folder)
        digests = json.loads((folder / _DIGESTS).read_text())
        changed = [name for name, digest in digests.items() if _digest(folder / name) != digest]
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise DamagedError(
            f"run.resume: {folder} holds no checkpoint that can be read ({type(error).__name__}: {error}); name a "
            "checkpoints/step_N folder, or set run.resume=never to start afresh"
        ) from error
    if changed:
        raise DamagedError(
            f"run.resume: {folder} is damaged: {', '.join(changed)} is not what was written; name an older "
            "checkpoints/step_N folder, or set run.resume=never to start afresh"
        )
    if state.seed != seed:
        raise ResumeError(
            f"train.seed = {seed}, but {folder} was made with train.seed = {state.seed}: data order and samples would "
            f"differ from the run it continues. Set train.seed={state.seed}."
        )
    return state


def _whole(checkpoints: Path) -> list[Path]:
    """By step."""
    return sorted((path for path in checkpoints.glob("step_*") if path.suffix != _UNFINISHED), key=_step)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def _state_of(folder: Path) -> TrainState:
    return TrainState(**json.loads((folder / _STATE).read_text()))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_ANYWHERE = ("run.", "wandb.", "cluster.")  # where a run is made and kept, not what it is
_OF_ADAPTERS = ("model.path", "model.tiny.", "learner.lora.")


def compare_settings(checkpoint: Path, config: Config, tell: Callable[[str], None]) -> None:
    """With those that lie beside the checkpoint, where they do."""
    file = checkpoint.parent.parent / "config.yaml"
    if not file.exists():
        return
    changed = dict(differences(file.read_text(), to_yaml(config)))
    if config.learner.lora.rank:
        for key in changed:
            if key.startswith(_OF_ADAPTERS):
                raise ResumeError(
                    f"run.resume: {checkpoint} holds adapters, which mean something else with another {key} "
                    f"({changed[key]}): set it as it was, or go on from the run's export by model.path"
                )
    if changed:
        told = ", ".join(f"{key} {change}" for key, change in changed.items())
        tell(f"it goes on with other settings than before: {told}")


def differences(before: str, now: str) -> Iterator[tuple[str, str]]:
    """Keys of both, and what became of their values; a key that only one version of the program knows is none."""
    from omegaconf import OmegaConf

    old, new = (dict(_flat(OmegaConf.to_container(OmegaConf.create(text)))) for text in (before, now))
    for key in new:
        if key in old and old[key] != new[key] and not key.startswith(_ANYWHERE):
            yield key, f"{old[key]} -> {new[key]}"


def _flat(tree: Any, above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value
