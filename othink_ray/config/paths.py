"""Resolution of the paths in a configuration: `~`, and relative paths in a submitted Ray job."""

from __future__ import annotations

from glob import glob
from pathlib import Path

_UNPACKED = "working_dir_files"  # where Ray unpacks a job's working directory; deleted when the job ends


def in_ray_job() -> bool:
    """Return whether this process runs in Ray's copy of a job's working directory."""
    return _UNPACKED in Path.cwd().parts


def output_path(path: str) -> str:
    """Resolve an output path: in a Ray job relative to the home folder, because Ray deletes the job's folder."""
    path = _expanded(path)
    return str(Path.home() / path) if in_ray_job() else path


def input_path(path: str) -> str:
    """Resolve an input path or glob pattern: in a Ray job, to the job's files, or the home folder if they have none.

    A hub name (owner/name) is returned unchanged, unless the home folder has a folder of the owner's name.
    """
    path = _expanded(path)
    in_home = Path.home() / path
    if not in_ray_job() or Path(path).exists() or glob(path) or not in_home.parent.is_dir():
        return path
    return str(in_home)


def _expanded(path: str) -> str:
    return str(Path(path).expanduser()) if path.startswith("~") else path
