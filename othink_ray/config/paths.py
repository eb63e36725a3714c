"""Where the paths of a configuration lead: `~`, and what is relative in a job that was handed in."""

from __future__ import annotations

from glob import glob
from pathlib import Path

_COPIES = "working_dir_files"  # where Ray unpacks the files that come with a job; they go when it ends


def in_job() -> bool:
    """Whether this process works in Ray's copy of a working directory."""
    return _COPIES in Path.cwd().parts


def written(path: str) -> str:
    """Where output goes: in a job below the home folder, because Ray removes the job's own folder when it ends."""
    path = _expanded(path)
    return str(Path.home() / path) if in_job() else path


def read(path: str) -> str:
    """Where input is, a path or a pattern: in a job among the files that came with it, else below the home folder.

    A name on the hub stays as it is, unless its owner is a folder at home.
    """
    path = _expanded(path)
    at_home = Path.home() / path
    if not in_job() or Path(path).exists() or glob(path) or not at_home.parent.is_dir():
        return path
    return str(at_home)


def _expanded(path: str) -> str:
    return str(Path(path).expanduser()) if path.startswith("~") else path
