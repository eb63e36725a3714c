"""How often a run mends itself, and what it says then."""

from __future__ import annotations

import pytest

from othink_ray.runtime.futures import WorkerFailed
from othink_ray.runtime.monitoring import Incidents


def test_restarts_are_told_and_counted_until_there_were_too_many() -> None:
    told: list[str] = []
    incidents = Incidents(2, told.append)
    incidents.restart("rollout_restarts", " it died\nin line 3")
    incidents.restart("rollout_restarts", WorkerFailed("it hangs"))
    assert told == ["it died: restarting it (1 of at most 2)", "it hangs: restarting it (2 of at most 2)"]
    assert incidents.restarts == 2
    with pytest.raises(WorkerFailed) as raised:
        incidents.restart("learner_restarts", "out of memory\nin line 4")
    assert str(raised.value) == (
        "out of memory; there were 2 restarts before, and faults.max_restarts = 2. The first cause was: it died\n"
        "in line 3"
    )
    assert incidents.take() == {
        "faults/rollout_restarts": 2.0,
        "faults/learner_restarts": 0.0,
        "faults/reward_restarts": 0.0,
        "faults/masked_answers": 0.0,
    }
    assert not any(incidents.take().values())
