"""What is different in a run that was submitted as a job."""

from __future__ import annotations

import pytest

from othink_ray.runtime.cluster import short_notice


def test_only_a_job_with_seconds_to_end_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    assert short_notice() is None
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    told = short_notice()
    assert told is not None and "launch/job.yaml" in told
    monkeypatch.setenv("RAY_JOB_STOP_WAIT_TIME_S", "600")
    assert short_notice() is None
