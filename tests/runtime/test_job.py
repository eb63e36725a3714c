"""Notice for a run that was submitted as a Ray job."""

from __future__ import annotations

import pytest

from othink_ray.runtime.cluster import ray_job_notice


def test_only_a_job_with_a_short_stop_time_gets_a_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ray_job_notice() is None
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    notice = ray_job_notice()
    assert notice is not None and "launch/job.yaml" in notice
    monkeypatch.setenv("RAY_JOB_STOP_WAIT_TIME_S", "600")
    assert ray_job_notice() is None
