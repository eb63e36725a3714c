"""The verbs of a team that need no actors to be told apart."""

from __future__ import annotations

from typing import Any

import pytest

from othink_ray.runtime.team import Team


class Recorder:
    """A learner and a push that only remember how they were asked, and engines that stay awake."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def sleep(self) -> None:
        pass

    def begin_update(self, packs: Any, **how: Any) -> None:
        self.asked.append(how)

    def begin(self) -> None:
        self.asked.append("push")

    def updated(self, begun: Any) -> list[Any]:
        return self.asked


@pytest.mark.parametrize(("stale", "correction"), [(False, "none"), (True, "sequence")])
def test_only_answers_of_older_weights_are_corrected_and_a_push_begins_behind_each_update(
    stale: bool, correction: str
) -> None:
    unused: Any = None
    recorder: Any = Recorder()
    team = Team(
        rollout=recorder,
        rewards=unused,
        incidents=unused,
        learner=recorder,
        pusher=recorder,
        max_tokens=1,
        temperature=1.0,
        seed=0,
        answers=2,
        loss="gspo",
        correction="sequence",
        coming=tuple,
    )
    asked: Any = team.update([], updates=1, beta=0.1, lr=0.2, stale=stale)
    assert asked == [{"updates": 1, "beta": 0.1, "lr": 0.2, "loss": "gspo", "correction": correction}, "push"]
