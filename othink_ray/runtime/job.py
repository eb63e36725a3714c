"""A run that was handed in with `ray job submit`: how long it has when it is told to stop."""

from __future__ import annotations

import os


def short_notice() -> str | None:
    """What to say of a job that would be killed seconds after it was told to stop."""
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ or "RAY_JOB_STOP_WAIT_TIME_S" in os.environ:
        return None
    return (
        "`ray job stop` kills this run 3 seconds after it asks it to end, which may be too soon to finish a step and "
        "save it; submit it with --runtime-env launch/job.yaml for 10 minutes"
    )
