"""Many actors as one: fan-out, gathering, time limits, and failures with the name of who failed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from othink_ray.config.schema import LearnerConfig, RewardConfig, RolloutConfig
from othink_ray.core.packing import plan
from othink_ray.engines.base import LearnerEngine, Place, RolloutEngine, Sampling
from othink_ray.engines.vllm_transfer import Sender
from othink_ray.runtime.actors import LearnerActor, RolloutActor
from othink_ray.runtime.placement import Placement
from othink_ray.runtime.reward_actor import RewardActor
from othink_ray.types import Group, Pack, Probe, Prompt, ScoredGroup, UpdateStats


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


class RolloutPool:
    """The sampling engines. Groups come as references, so that images and answers need not pass through the driver."""

    def __init__(self, make_engine: Callable[[], RolloutEngine], rollout: RolloutConfig, placement: Placement) -> None:
        self.step_timeout_s, self.load_timeout_s = rollout.step_timeout_s, rollout.load_timeout_s
        self.actors = [
            placement.start(RolloutActor, "rollout", index, make_engine) for index in range(rollout.num_actors)
        ]

    def wait(self) -> None:
        gather([actor.ready.remote() for actor in self.actors], "a rollout actor (loading)", self.load_timeout_s)

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[Any]:
        """References to groups, as they finish on any actor."""
        streams = [
            actor.generate.options(num_returns="streaming").remote(prompts[index :: len(self.actors)], sampling)
            for index, actor in enumerate(self.actors)
        ]
        while streams:
            ready, _ = ray.wait(streams, num_returns=1, timeout=self.step_timeout_s, fetch_local=False)
            if not ready:
                raise WorkerFailed(f"{len(streams)} rollout actors gave no group within {self.step_timeout_s:.0f} s")
            try:
                yield next(ready[0])
            except StopIteration:
                streams.remove(ready[0])

    def load_weights(self, version: int, chunks: Sequence[Any]) -> list[int]:
        """Every engine's version after loading."""
        loads = [actor.load_weights.remote(version, *chunks) for actor in self.actors]
        return gather(loads, "a rollout actor (loading weights)", self.step_timeout_s)

    def adopt(self, version: int) -> list[int]:
        """Every engine's version after a transfer of its own."""
        return gather([actor.adopt.remote(version) for actor in self.actors], "a rollout actor", self.step_timeout_s)

    def probe(self, prompts: Sequence[Prompt], sampling: Sampling, candidates: int) -> list[Probe]:
        """Every engine's probes, one engine after the other."""
        asked = [actor.probe.remote(prompts, sampling, candidates) for actor in self.actors]
        return [probe for probes in gather(asked, "a rollout actor (probe)", self.step_timeout_s) for probe in probes]


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
        [(address, port)] = self._all([self.ranks[0].address.remote()], "loading", self.learner.load_timeout_s)
        self.places = [
            Place(rank=rank, world_size=len(self.ranks), master_address=address, master_port=port)
            for rank in range(len(self.ranks))
        ]
        return [
            actor.start.remote(self.make_engine, place) for actor, place in zip(self.ranks, self.places, strict=True)
        ]

    def wait(self, started: Sequence[Any]) -> None:
        self._all(started, "loading", self.learner.load_timeout_s)

    def update(
        self, packs: Sequence[Pack], *, updates: int, beta: float, lr: float, loss: str, correction: str
    ) -> UpdateStats:
        """One batch of rows, balanced over ranks."""
        shares = plan(packs, ranks=len(self.ranks), updates=updates, micro_tokens=self.learner.micro_tokens)
        calls = []
        for rank, actor in enumerate(self.ranks):
            own = [[[packs[row] for row in micro] for micro in update[rank]] for update in shares]
            calls.append(actor.update.remote(own, beta, lr, loss, correction))
        stats: UpdateStats = self._all(calls, "update")[0]
        return stats

    def candidate_logprobs(self, probes: Sequence[Probe]) -> list[NDArray[np.float32]]:
        shared = ray.put(list(probes))
        calls = [actor.candidate_logprobs.remote(shared) for actor in self.ranks]
        logprobs: list[NDArray[np.float32]] = self._all(calls, "audit")[0]
        return logprobs

    def chunks(self, bucket_bytes: int) -> Iterator[Any]:
        """References to the policy's buckets, as they are gathered."""
        following = [actor.follow.remote() for actor in self.ranks[1:]]
        yield from self.ranks[0].chunks.options(num_returns="streaming").remote(bucket_bytes)
        self._all(following, "gathering weights")

    def open_senders(self, make_sender: Callable[[Place, int, LearnerEngine], Sender]) -> None:
        """Meet the engines on a port of their own."""
        [(_, port)] = self._all([self.ranks[0].address.remote()], "opening the weight transfer")
        opened = [
            actor.open_sender.remote(partial(make_sender, place, port))
            for actor, place in zip(self.ranks, self.places, strict=True)
        ]
        self._all(opened, "opening the weight transfer", self.learner.load_timeout_s)

    def send(self) -> None:
        self._all([actor.send.remote() for actor in self.ranks], "sending weights")

    def export(self, folder: Path) -> None:
        self._all([actor.export.remote(folder) for actor in self.ranks], "export")

    def save(self, folder: Path) -> None:
        self._all([actor.save.remote(folder) for actor in self.ranks], "saving a checkpoint")

    def load(self, folder: Path) -> None:
        self._all([actor.load.remote(folder) for actor in self.ranks], "loading a checkpoint")

    def _all(self, calls: Sequence[Any], doing: str, timeout_s: float | None = None) -> list[Any]:
        return gather(calls, f"the learner ({doing})", timeout_s or self.learner.step_timeout_s)
