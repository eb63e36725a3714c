"""Restarts of a run: their limit and their messages."""

from __future__ import annotations

import pytest

from othink_ray.runtime.futures import WorkerFailed
from othink_ray.runtime.monitoring import Incidents


def test_restarts_are_logged_and_counted_up_to_the_limit() -> None:
    logged: list[str] = []
    incidents = Incidents(2, logged.append)
    incidents.restart("rollout_restarts", " it died\nin line 3")
    incidents.restart("rollout_restarts", WorkerFailed("it hangs"))
    assert logged == ["it died: restarting it (1 of at most 2)", "it hangs: restarting it (2 of at most 2)"]
    assert incidents.restarts == 2
    with pytest.raises(WorkerFailed) as raised:
        incidents.restart("learner_restarts", "out of memory\nin line 4")
    assert str(raised.value) == (
        "out of memory; not restarted: 2 restarts used, faults.max_restarts = 2. "
        "Remove the first cause, or raise faults.max_restarts. First cause: it died\nin line 3"
    )
    assert incidents.take() == {
        "faults/rollout_restarts": 2.0,
        "faults/learner_restarts": 0.0,
        "faults/reward_restarts": 0.0,
        "faults/masked_answers": 0.0,
    }
    assert not any(incidents.take().values())
