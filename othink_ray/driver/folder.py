"""A run's folder belongs to one run at a time, and a fresh run does not mix with what an older one left."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class FolderError(RuntimeError):
    """The run cannot have its folder."""


@contextmanager
def own_folder(run_dir: Path) -> Iterator[None]:
    """Until the process ends, in whatever way, no other run gets in."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = (run_dir / ".lock").open("w")
    except OSError as error:
        raise FolderError(
            f"run.dir = {run_dir}: cannot be written ({error.strerror}); choose a folder of your own, or make room"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FolderError(
                f"run.dir = {run_dir}: another run is at work in it; wait for it, or give this one a folder of its own"
            ) from error
        yield


def set_aside_checkpoints(run_dir: Path) -> None:
    """Those of an older run: a restart of this one must not go on from them."""
    there, aside = run_dir / "checkpoints", run_dir / "checkpoints.discarded"
    if there.exists():
        shutil.rmtree(aside, ignore_errors=True)
        there.rename(aside)
