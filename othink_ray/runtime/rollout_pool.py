"""Pool of rollout engines: prompts balanced by expected work, groups streamed back, lost engines replaced."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayError

from othink_ray.config.schema import RolloutConfig
from othink_ray.engines.base import RolloutEngine, Sampling
from othink_ray.runtime.actors import RolloutActor
from othink_ray.runtime.futures import ProcessLost, Streams, WorkersLost, gather
from othink_ray.runtime.monitoring import Incidents
from othink_ray.runtime.placement import Placement
from othink_ray.types import Group, Prompt

_NAME = "a rollout actor"
_KEPT = 2**17  # prompts whose answer lengths are remembered, least recently seen dropped first
_CHARACTERS_A_TOKEN = 4
_TOKENS_AN_IMAGE = 256
# A prompt's tokens are processed in parallel, an answer's one after the other.
_PROMPT_TOKENS_AN_ANSWER_TOKEN = 8

SyncEngines = Callable[[Sequence[int]], None]  # sends the last pushed weights to the engines of these indices


class AnswerLengths:
    """Mean answer length by prompt, as an estimate for the next answers to it."""

    def __init__(self) -> None:
        self._seen: dict[str, float] = {}
        self._tokens = 0
        self._answers = 0

    def note(self, group: Group) -> None:
        lengths = [len(answer.token_ids) for answer in group.completions]
        self._seen.pop(group.prompt.id, None)
        self._seen[group.prompt.id] = float(np.mean(lengths))
        if len(self._seen) > _KEPT:
            del self._seen[next(iter(self._seen))]
        self._tokens += sum(lengths)
        self._answers += len(lengths)

    def work(self, prompt: Prompt, answers: int) -> float:
        """Return the expected work in answer tokens: the length of the prompt's last answers, else the overall mean.

        The prompt's text and images add a little.
        """
        length = self._seen.get(prompt.id, self._tokens / max(self._answers, 1))
        text = sum(len(message.text) for message in prompt.messages) / _CHARACTERS_A_TOKEN
        images = len(prompt.images) * _TOKENS_AN_IMAGE
        return answers * length + (text + images) / _PROMPT_TOKENS_AN_ANSWER_TOKEN


def balance(work: Sequence[float], actors: int) -> list[list[int]]:
    """Return the indices of `work` for each actor: longest first, each to the actor with the least load so far."""
    assigned: list[list[int]] = [[] for _ in range(actors)]
    load = [0.0] * actors
    for index in sorted(range(len(work)), key=lambda index: -work[index]):
        actor = load.index(min(load))
        assigned[actor].append(index)
        load[actor] += work[index]
    return assigned


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """Prompts of one actor, and the argument to pass for them: the prompts themselves or a reference to them."""

    prompts: Sequence[Prompt]
    argument: Any


class RolloutPool:
    """Rollout engines in their actors.

    Groups are returned as object references, so that images and answers need not pass through the driver.
    """

    def __init__(
        self,
        make_engine: Callable[[], RolloutEngine],
        rollout: RolloutConfig,
        placement: Placement,
        incidents: Incidents,
    ) -> None:
        self.make_engine, self.placement, self.incidents = make_engine, placement, incidents
        self.step_timeout_s, self.load_timeout_s = rollout.step_timeout_s, rollout.load_timeout_s
        self.sleeps, self.processes_per_actor = rollout.sleep, rollout.tensor_parallel
        self.lengths = AnswerLengths() if rollout.balance else None
        self.actors = [self._start(index) for index in range(rollout.num_actors)]
        self.prefetched: tuple[Sequence[Prompt], list[Shard]] = ([], [])

    def _start(self, index: int) -> Any:
        return self.placement.start(RolloutActor, "rollout", index, self.make_engine)

    def wait(self) -> None:
        gather([actor.ready.remote() for actor in self.actors], f"{_NAME} (loading)", self.load_timeout_s)

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, sync: SyncEngines | None = None) -> Iterator[Any]:
        """Yield references to groups as they finish on any actor.

        A lost actor is replaced and its prompts are sampled again; `sync` sends the new engine the weights of the
        others (None: the weights of the model folder are the right ones).
        """
        left = list(prompts)
        while left:
            shards = self._shards_of(left, sampling.answers)
            calls = {
                index: actor.generate.options(num_returns="streaming").remote(shard.argument, sampling)
                for index, (actor, shard) in enumerate(zip(self.actors, shards, strict=True))
            }
            sizes = {index: len(shard.prompts) for index, shard in enumerate(shards)}
            streams = Streams(calls, _NAME, self.step_timeout_s, sizes)
            yield from streams
            left = [
                prompt
                for index in streams.lost
                for prompt in _unanswered(shards[index].prompts, streams.received[index])
            ]
            if streams.lost:
                self.replace(WorkersLost(_NAME, streams.lost), sync)
                if left:
                    self.incidents.log(f"{len(left)} of {len(prompts)} prompts are sampled again")

    def prefetch(self, prompts: Sequence[Prompt], answers: int) -> None:
        """Shard the next prompts and let the engines prefetch their inputs; return at once.

        Errors of the prefetch are raised when the prompts are sampled.
        """
        shards = [Shard(prompts=shard, argument=ray.put(shard)) for shard in self._split(prompts, answers)]
        self.prefetched = list(prompts), shards
        for actor, shard in zip(self.actors, shards, strict=True):
            if shard.prompts:
                actor.prefetch.remote(shard.argument)

    def _shards_of(self, prompts: Sequence[Prompt], answers: int) -> list[Shard]:
        prefetched, shards = self.prefetched
        if prefetched == prompts:
            return shards
        return [Shard(prompts=shard, argument=shard) for shard in self._split(prompts, answers)]

    def _split(self, prompts: Sequence[Prompt], answers: int) -> list[Sequence[Prompt]]:
        """Return the prompts of each actor; answers do not depend on the actor that samples them."""
        if self.lengths is None or len(self.actors) == 1:
            return [prompts[index :: len(self.actors)] for index in range(len(self.actors))]
        work = [self.lengths.work(prompt, answers) for prompt in prompts]
        return [[prompts[index] for index in indices] for indices in balance(work, len(self.actors))]

    def replace(self, failure: WorkersLost, sync: SyncEngines | None = None) -> None:
        """Restart the lost actors in their bundles, then pass their indices to `sync`."""
        self.incidents.restart("rollout_restarts", failure)
        if self.placement.has_lost_a_node():
            raise ProcessLost(f"{failure}, and the run lost a node with it")
        began = time.monotonic()
        for index in failure.lost:
            ray.kill(self.actors[index])
            self.actors[index] = self._start(index)
        new = list(failure.lost)
        gather([self.actors[index].ready.remote() for index in new], f"{_NAME} (restarting)", self.load_timeout_s)
        if sync is not None:
            sync(new)
        self.incidents.log(f"{_NAME} is back after {time.monotonic() - began:.1f} s")

    def record_lengths(self, groups: Iterable[Group]) -> None:
        """Record answer lengths, to balance the next prompts."""
        if self.lengths is not None:
            for group in groups:
                self.lengths.note(group)

    def sleep(self) -> None:
        """With rollout.sleep, free the memory of engines that share GPUs with the learner until the next push."""
        if self.sleeps:
            self.wait_for([actor.sleep.remote() for actor in self.actors], "going to sleep")

    def begin_push(self, engines: Sequence[int] | None = None) -> list[Any]:
        return [actor.begin_push.remote() for actor in self._actors(engines)]

    def load_weights(self, bucket: Any, engines: Sequence[int] | None = None) -> list[Any]:
        return [actor.load_weights.remote(bucket) for actor in self._actors(engines)]

    def finish_push(self, version: int, buckets: int, engines: Sequence[int] | None = None) -> list[Any]:
        """Return a reference to each engine's version after the push."""
        return [actor.finish_push.remote(version, buckets) for actor in self._actors(engines)]

    def check_weights(self, *expected: Any, complete: bool, engines: Sequence[int] | None = None) -> list[Any]:
        """Return a reference to each engine's wrong weights; `expected`: digests, or references to them."""
        return [actor.check_weights.remote(complete, *expected) for actor in self._actors(engines)]

    def probe(
        self, prompts: Any, sampling: Sampling, candidates: int, engines: Sequence[int] | None = None
    ) -> list[Any]:
        """Return a reference to each engine's list of probes."""
        return [actor.probe.remote(prompts, sampling, candidates) for actor in self._actors(engines)]

    def _actors(self, engines: Sequence[int] | None) -> list[Any]:
        return self.actors if engines is None else [self.actors[index] for index in engines]

    def wait_for(self, calls: Sequence[Any], doing: str) -> list[Any]:
        """Return the results of calls, one per actor, in order."""
        return gather(calls, f"{_NAME} ({doing})", self.step_timeout_s)


def _unanswered(prompts: Sequence[Prompt], received: Sequence[Any]) -> list[Prompt]:
    """Return the prompts of a lost actor whose groups were not yielded, or were lost with it."""
    answered = set()
    for reference in received:
        try:
            group: Group = ray.get(reference)
        except RayError:
            continue
        answered.add(group.prompt.id)
    return [prompt for prompt in prompts if prompt.id not in answered]
