"""Many actors as one: fan-out, gathering, time limits, and failures with the name of who failed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from othink_ray.config.schema import LearnerConfig, RewardConfig, RolloutConfig
from othink_ray.core.packing import plan
from othink_ray.engines.base import LearnerEngine, Place, RolloutEngine, Sampling
from othink_ray.engines.vllm_transfer import Sender
from othink_ray.runtime.actors import LearnerActor, RolloutActor
from othink_ray.runtime.balance import AnswerLengths, deal
from othink_ray.runtime.placement import Placement
from othink_ray.runtime.reward_actor import RewardActor
from othink_ray.types import Group, Pack, Prompt, ScoredGroup, UpdateStats


class WorkerFailed(RuntimeError):
    """A process of the run failed; the message names it and its cause."""


def gather(references: Sequence[Any], who: str, timeout_s: float) -> list[Any]:
    """All results, or the first failure by name: a silent hang is the worst of errors."""
    try:
        results: list[Any] = ray.get(list(references), timeout=timeout_s)
        return results
    except GetTimeoutError as error:
        raise WorkerFailed(f"{who} gave no answer within {timeout_s:.0f} s") from error
    except RayTaskError as error:
        raise WorkerFailed(f"{who} failed: {error.cause!r}\n{error}") from error
    except RayActorError as error:
        raise WorkerFailed(f"{who} died: {error}") from error


def arriving(streams: list[Any], who: str, timeout_s: float) -> Iterator[Any]:
    """References to what Ray's streams give, as it comes from any of them; none of it is fetched."""
    while streams:
        ready, _ = ray.wait(streams, num_returns=1, timeout=timeout_s, fetch_local=False)
        if not ready:
            raise WorkerFailed(f"{who} gave nothing within {timeout_s:.0f} s")
        try:
            yield next(ready[0])
        except StopIteration:
            streams.remove(ready[0])


class RolloutPool:
    """The sampling engines. Groups come as references, so that images and answers need not pass through the driver."""

    def __init__(self, make_engine: Callable[[], RolloutEngine], rollout: RolloutConfig, placement: Placement) -> None:
        self.step_timeout_s, self.load_timeout_s = rollout.step_timeout_s, rollout.load_timeout_s
        self.lengths = AnswerLengths() if rollout.balance else None
        self.actors = [
            placement.start(RolloutActor, "rollout", index, make_engine) for index in range(rollout.num_actors)
        ]

    def wait(self) -> None:
        gather([actor.ready.remote() for actor in self.actors], "a rollout actor (loading)", self.load_timeout_s)

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[Any]:
        """References to groups, as they finish on any actor."""
        streams = [
            actor.generate.options(num_returns="streaming").remote(own, sampling)
            for actor, own in zip(self.actors, self._shares(prompts, sampling.answers), strict=True)
        ]
        yield from arriving(streams, "a rollout actor", self.step_timeout_s)

    def _shares(self, prompts: Sequence[Prompt], answers: int) -> list[Sequence[Prompt]]:
        """The prompts of each actor; answers do not depend on where they are sampled."""
        if self.lengths is None or len(self.actors) == 1:
            return [prompts[index :: len(self.actors)] for index in range(len(self.actors))]
        work = [self.lengths.work(prompt, answers) for prompt in prompts]
        return [[prompts[index] for index in own] for own in deal(work, len(self.actors))]

    def note(self, groups: Iterable[Group]) -> None:
        """What was answered, for a fair share of the next prompts."""
        if self.lengths is not None:
            for group in groups:
                self.lengths.note(group)

    def begin_push(self) -> list[Any]:
        return [actor.begin_push.remote() for actor in self.actors]

    def load_weights(self, bucket: Any) -> list[Any]:
        return [actor.load_weights.remote(bucket) for actor in self.actors]

    def finish_push(self, version: int, buckets: int) -> list[Any]:
        """A reference to each engine's version after it."""
        return [actor.finish_push.remote(version, buckets) for actor in self.actors]

    def probe(self, prompts: Any, sampling: Sampling, candidates: int) -> list[Any]:
        """A reference to each engine's list of probes."""
        return [actor.probe.remote(prompts, sampling, candidates) for actor in self.actors]

    def wait_for(self, calls: Sequence[Any], doing: str) -> list[Any]:
        return gather(calls, f"a rollout actor ({doing})", self.step_timeout_s)


class RewardPool:
    """Scores groups as they arrive. A grader that outstays its time is killed; its group is masked, not scored 0."""

    def __init__(self, reward: RewardConfig) -> None:
        self.reward = reward
        self.actors = [Placement.start_unseated(RewardActor, reward) for _ in range(reward.actors)]

    def score(self, groups: Iterable[Any]) -> list[ScoredGroup]:
        """In the order of arrival."""
        asked = []
        for number, group in enumerate(groups):
            index = number % len(self.actors)
            asked.append((group, index, self.actors[index].score.remote(group)))
        return [self._collect(*one) for one in asked]

    def _collect(self, group: Any, index: int, reference: Any) -> ScoredGroup:
        try:
            scored: ScoredGroup = ray.get(reference, timeout=self.reward.timeout_s)
            return scored
        except RayTaskError as error:
            raise WorkerFailed(f"generating or scoring a group failed: {error.cause!r}\n{error}") from error
        except (GetTimeoutError, RayActorError):
            ray.kill(self.actors[index])
            self.actors[index] = Placement.start_unseated(RewardActor, self.reward)
            return _masked(gather([group], "a rollout actor", self.reward.timeout_s)[0])


def _masked(group: Group) -> ScoredGroup:
    size = len(group.completions)
    return ScoredGroup(group=group, rewards=np.zeros(size), parts={}, valid=np.zeros(size, dtype=np.bool_))


class LearnerPool:
    """The learner's ranks, called together."""

    def __init__(
        self, make_engine: Callable[[Place], LearnerEngine], learner: LearnerConfig, placement: Placement
    ) -> None:
        self.learner = learner
        self.ranks = [placement.start(LearnerActor, "learner", rank) for rank in range(learner.world_size)]
        self.make_engine = make_engine

    def start(self) -> list[Any]:
        """Begin loading; wait for the references to know that it is done."""
        [(address, port)] = self.wait_for([self.ranks[0].address.remote()], "loading", self.learner.load_timeout_s)
        self.places = [
            Place(rank=rank, world_size=len(self.ranks), master_address=address, master_port=port)
            for rank in range(len(self.ranks))
        ]
        return [
            actor.start.remote(self.make_engine, place) for actor, place in zip(self.ranks, self.places, strict=True)
        ]

    def wait(self, started: Sequence[Any]) -> None:
        self.wait_for(started, "loading", self.learner.load_timeout_s)

    def update(
        self, packs: Sequence[Pack], *, updates: int, beta: float, lr: float, loss: str, correction: str
    ) -> UpdateStats:
        """One batch of rows, balanced over ranks."""
        shares = plan(packs, ranks=len(self.ranks), updates=updates, micro_tokens=self.learner.micro_tokens)
        calls = []
        for rank, actor in enumerate(self.ranks):
            own = [[[packs[row] for row in micro] for micro in update[rank]] for update in shares]
            calls.append(actor.update.remote(own, beta, lr, loss, correction))
        stats: UpdateStats = self.wait_for(calls, "update")[0]
        return stats

    def candidate_logprobs(self, probes: Sequence[Any]) -> list[Any]:
        """For references to each engine's probes: one to each rank's logprobs of all of them, which are the same."""
        return [actor.candidate_logprobs.remote(*probes) for actor in self.ranks]

    def chunks(self, bucket_bytes: int, ahead: int) -> Iterator[Any]:
        """References to the buckets of what is trained, gathered at most `ahead` of them before they are asked for."""
        following = [actor.follow.remote() for actor in self.ranks[1:]]
        streaming = {"num_returns": "streaming", "_generator_backpressure_num_objects": ahead}
        stream = self.ranks[0].chunks.options(**streaming).remote(bucket_bytes)
        yield from arriving([stream], "the learner (gathering weights)", self.learner.step_timeout_s)
        self.wait_for(following, "gathering weights")

    def open_senders(self, make_sender: Callable[[Place, int, LearnerEngine], Sender]) -> None:
        """Meet the engines on a port of their own."""
        [(_, port)] = self.wait_for([self.ranks[0].address.remote()], "opening the weight transfer")
        opened = [
            actor.open_sender.remote(partial(make_sender, place, port))
            for actor, place in zip(self.ranks, self.places, strict=True)
        ]
        self.wait_for(opened, "opening the weight transfer", self.learner.load_timeout_s)

    def send(self) -> None:
        self.wait_for([actor.send.remote() for actor in self.ranks], "sending weights")

    def export(self, folder: Path) -> None:
        self.wait_for([actor.export.remote(folder) for actor in self.ranks], "export")

    def save(self, folder: Path) -> None:
        self.wait_for([actor.save.remote(folder) for actor in self.ranks], "saving a checkpoint")

    def load(self, folder: Path) -> None:
        self.wait_for([actor.load.remote(folder) for actor in self.ranks], "loading a checkpoint")

    def wait_for(self, calls: Sequence[Any], doing: str, timeout_s: float | None = None) -> list[Any]:
        return gather(calls, f"the learner ({doing})", timeout_s or self.learner.step_timeout_s)
