"""The verbs of a team that need no actors to be told apart."""

from __future__ import annotations

from typing import Any

import pytest

from othink_ray.runtime.team import Team


class Recorder:
    """A learner that only remembers how it was asked, and engines that stay awake."""

    def sleep(self) -> None:
        pass

    def update(self, packs: Any, **how: Any) -> dict[str, Any]:
        return how


@pytest.mark.parametrize(("stale", "correction"), [(False, "none"), (True, "sequence")])
def test_only_answers_of_older_weights_are_corrected(stale: bool, correction: str) -> None:
    unused: Any = None
    recorder: Any = Recorder()
    team = Team(
        rollout=recorder,
        rewards=unused,
        incidents=unused,
        learner=recorder,
        pusher=unused,
        max_tokens=1,
        temperature=1.0,
        seed=0,
        answers=2,
        loss="gspo",
        correction="sequence",
    )
    how: Any = team.update([], updates=1, beta=0.1, lr=0.2, stale=stale)
    assert how == {"updates": 1, "beta": 0.1, "lr": 0.2, "loss": "gspo", "correction": correction}
