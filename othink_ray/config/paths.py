"""Where the paths of a configuration lead: `~`, and what is relative in a job that was handed in."""

from __future__ import annotations

from glob import glob
from pathlib import Path

_COPIES = "working_dir_files"  # where Ray unpacks the files that come with a job; they go when it ends


def in_job() -> bool:
    """Whether this process works in Ray's copy of a working directory."""
    return _COPIES in Path.cwd().parts


def written(path: str) -> str:
    """Of what a run writes: in a job below the home folder, for it must outlive the copy."""
    path = _expanded(path)
    return str(Path.home() / path) if in_job() else path


def read(path: str) -> str:
    """Of what a run reads, pattern or not: in a job what came with it, else what an earlier job left at home.

    A name on the hub, whose owner is no folder there, stays as it is.
    """
    path = _expanded(path)
    at_home = Path.home() / path
    if not in_job() or Path(path).exists() or glob(path) or not at_home.parent.is_dir():
        return path
    return str(at_home)


def _expanded(path: str) -> str:
    return str(Path(path).expanduser()) if path.startswith("~") else path
