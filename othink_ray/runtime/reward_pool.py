"""The graders as one. Who outstays its time, dies or runs out of memory is replaced; the answer at fault is masked."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import ray
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError, RayTaskError

from othink_ray.config.schema import RewardConfig
from othink_ray.rewards.custom import load_custom_reward
from othink_ray.runtime.futures import WorkerFailed, gather
from othink_ray.runtime.monitoring import Incidents
from othink_ray.runtime.placement import Placement
from othink_ray.runtime.reward_actor import RewardActor
from othink_ray.types import Group, ScoredGroup

_WHO, _START_S = "a reward actor", 120.0


class _Lost(Exception):
    """The grader gave no score: it died or hangs."""


@dataclass(slots=True)
class _Asked:
    group: Any  # a reference
    index: int
    actor: Any  # who was asked: by now another one may sit in its place
    score: Any  # a reference


class RewardPool:
    """Scores groups as they arrive."""

    def __init__(self, reward: RewardConfig, incidents: Incidents) -> None:
        self.reward, self.incidents = reward, incidents
        self.own = load_custom_reward(reward.own)
        self.actors = [self._start() for _ in range(reward.actors)]

    def _start(self) -> Any:
        return Placement.start_unseated(RewardActor, self.reward, self.own)

    def wait(self) -> None:
        gather([actor.ready.remote() for actor in self.actors], f"{_WHO} (loading)", _START_S)

    def score(self, groups: Iterable[Any]) -> list[ScoredGroup]:
        """In the order of arrival."""
        asked = [self._ask(group, number % len(self.actors)) for number, group in enumerate(groups)]
        return [self._collect(one) for one in asked]

    def _ask(self, group: Any, index: int) -> _Asked:
        actor = self.actors[index]
        return _Asked(group=group, index=index, actor=actor, score=actor.score.remote(group))

    def _collect(self, asked: _Asked) -> ScoredGroup:
        try:
            return self._scored(asked)
        except _Lost:
            if self._replace(asked):  # its own doing; else it only stood in line behind one that was lost
                [group] = gather([asked.group], "a rollout actor (handing over a group)", self.reward.timeout_s)
                return self._answer_by_answer(group, asked.index)
            return self._collect(self._ask(asked.group, asked.index))

    def _scored(self, asked: _Asked) -> ScoredGroup:
        try:
            scored: ScoredGroup = ray.get(asked.score, timeout=self.reward.timeout_s)
            return scored
        except RayTaskError as error:
            raise WorkerFailed(f"scoring a group failed: {error.cause!r}\n{error}") from error
        except ObjectLostError as error:
            raise WorkerFailed(f"a group was lost before it was scored: {error}") from error
        except (GetTimeoutError, RayActorError) as error:
            raise _Lost from error

    def _replace(self, asked: _Asked) -> bool:
        """Whether it was still there: then it is killed, and another one sits in its place."""
        if self.actors[asked.index] is not asked.actor:
            return False
        ray.kill(asked.actor)
        self.actors[asked.index] = self._start()
        gather([self.actors[asked.index].ready.remote()], f"{_WHO} (restarting)", _START_S)
        self.incidents.counts["reward_restarts"] += 1
        return True

    def _answer_by_answer(self, group: Group, index: int) -> ScoredGroup:
        """Each answer alone, so that only the one that the grader cannot bear is masked."""
        size = len(group.completions)
        rewards, valid = np.zeros(size), np.zeros(size, dtype=np.bool_)
        parts: dict[str, Any] = {}
        graded: dict[str, int] = {}
        for place, completion in enumerate(group.completions):
            asked = self._ask(ray.put(replace(group, completions=(completion,))), index)
            try:
                alone = self._scored(asked)
            except _Lost:
                self._replace(asked)
                continue
            rewards[place], valid[place] = alone.rewards[0], alone.valid[0]
            for name, part in alone.parts.items():
                parts.setdefault(name, np.zeros(size))[place] = part[0]
            for name, count in alone.graded.items():
                graded[name] = graded.get(name, 0) + count
        lost = int((~valid).sum())
        self.incidents.note(
            "masked_answers",
            f"grading {lost} of {size} answers to {group.prompt.id} took longer than algo.reward.timeout_s = "
            f"{self.reward.timeout_s:g} or ended the process: they are masked",
            count=lost,
        )
        return ScoredGroup(group=group, rewards=rewards, parts=parts, valid=valid, graded=graded)
