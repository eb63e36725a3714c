"""A run that was handed in with `ray job submit`: where its files stay, and how long it has when it is told to stop."""

from __future__ import annotations

import os
from pathlib import Path

_COPIES = "working_dir_files"  # where Ray unpacks the working directories that come with jobs


def lasting(folder: str, here: Path) -> str:
    """As it is, unless `here` is Ray's copy of a working directory, which goes with its job: then below the home."""
    return str(Path.home() / folder) if _COPIES in here.parts else folder


def short_notice() -> str | None:
    """What to say of a job that would be killed seconds after it was told to stop."""
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ or "RAY_JOB_STOP_WAIT_TIME_S" in os.environ:
        return None
    return (
        "`ray job stop` kills this run 3 seconds after it asks it to end, which may be too soon to finish a step and "
        "save it; submit it with --runtime-env launch/job.yaml for 10 minutes"
    )
