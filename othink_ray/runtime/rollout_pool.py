"""Prompts dealt to engines by how much work each is likely to be: the step ends when the last engine does."""

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

_KEPT = 2**17  # prompts whose lengths are remembered; those not seen for longest are forgotten first
_CHARACTERS_A_TOKEN = 4
_TOKENS_AN_IMAGE = 256
# A prompt's tokens go through the network side by side, an answer's one after the other.
_PROMPT_TOKENS_AN_ANSWER_TOKEN = 8


class AnswerLengths:
    """How long answers were, by prompt: what the next ones are likely to be."""

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
        """In answer tokens: those of its last answers, or of an average one; its text and images count a little."""
        length = self._seen.get(prompt.id, self._tokens / max(self._answers, 1))
        text = sum(len(message.text) for message in prompt.messages) / _CHARACTERS_A_TOKEN
        images = len(prompt.images) * _TOKENS_AN_IMAGE
        return answers * length + (text + images) / _PROMPT_TOKENS_AN_ANSWER_TOKEN


def balance(work: Sequence[float], hands: int) -> list[list[int]]:
    """Indices for each hand: the most work first, each to the hand with the least so far."""
    dealt: list[list[int]] = [[] for _ in range(hands)]
    load = [0.0] * hands
    for index in sorted(range(len(work)), key=lambda index: -work[index]):
        hand = load.index(min(load))
        dealt[hand].append(index)
        load[hand] += work[index]
    return dealt


_WHO = "a rollout actor"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """An actor's prompts, and what it is given: these, or a reference to them."""

    prompts: Sequence[Prompt]
    given: Any


class RolloutPool:
    """Groups come as references, so that images and answers need not pass through the driver."""

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
        self.expected: tuple[Sequence[Prompt], list[Shard]] = ([], [])
        self.sync_new_engines: Callable[[Sequence[int]], None] | None = None
        """Gives new actors the weights that the others have; without it those of the folder are the right ones."""

    def _start(self, index: int) -> Any:
        return self.placement.start(RolloutActor, "rollout", index, self.make_engine)

    def wait(self) -> None:
        gather([actor.ready.remote() for actor in self.actors], f"{_WHO} (loading)", self.load_timeout_s)

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[Any]:
        """References to groups, as they finish on any actor: all of them, whoever is lost on the way."""
        left = list(prompts)
        while left:
            hands = self._hands(left, sampling.answers)
            calls = {
                index: actor.generate.options(num_returns="streaming").remote(hand.given, sampling)
                for index, (actor, hand) in enumerate(zip(self.actors, hands, strict=True))
            }
            sizes = {index: len(hand.prompts) for index, hand in enumerate(hands)}
            streams = Streams(calls, _WHO, self.step_timeout_s, sizes)
            yield from streams
            left = [
                prompt for index in streams.lost for prompt in _unanswered(hands[index].prompts, streams.came[index])
            ]
            if streams.lost:
                self.replace(WorkersLost(_WHO, streams.lost), equipped=True)
                if left:
                    self.incidents.tell(f"{len(left)} of {len(prompts)} questions are asked again")

    def prefetch(self, prompts: Sequence[Prompt], answers: int) -> None:
        """These will be asked next: the engines get ready for them while the learner is at work."""
        shares = self._shares(prompts, answers)
        self.expected = list(prompts), [Shard(prompts=own, given=ray.put(own)) for own in shares]
        if not self.sleeps:
            self._prepare()

    def _prepare(self) -> None:
        """Nobody waits for it; what cannot be prepared says why when it is asked."""
        for actor, hand in zip(self.actors, self.expected[1], strict=False):
            if hand.prompts:
                actor.prepare.remote(hand.given)

    def _hands(self, prompts: Sequence[Prompt], answers: int) -> list[Shard]:
        expected, hands = self.expected
        if expected == prompts:
            return hands
        return [Shard(prompts=own, given=own) for own in self._shares(prompts, answers)]

    def _shares(self, prompts: Sequence[Prompt], answers: int) -> list[Sequence[Prompt]]:
        """The prompts of each actor; answers do not depend on where they are sampled."""
        if self.lengths is None or len(self.actors) == 1:
            return [prompts[index :: len(self.actors)] for index in range(len(self.actors))]
        work = [self.lengths.work(prompt, answers) for prompt in prompts]
        return [[prompts[index] for index in own] for own in balance(work, len(self.actors))]

    def replace(self, failure: WorkersLost, *, equipped: bool) -> None:
        """Others in the places of those that are lost; `equipped`: with the weights that the others have."""
        self.incidents.restart("rollout_restarts", failure)
        if self.placement.has_lost_a_node():
            raise ProcessLost(f"{failure}, and a node of the run with it")
        began = time.monotonic()
        for index in failure.lost:
            ray.kill(self.actors[index])
            self.actors[index] = self._start(index)
        new = list(failure.lost)
        gather([self.actors[index].ready.remote() for index in new], f"{_WHO} (restarting)", self.load_timeout_s)
        if equipped and self.sync_new_engines is not None:
            self.sync_new_engines(new)
        self.incidents.tell(f"{_WHO} is back after {time.monotonic() - began:.1f} s")

    def note(self, groups: Iterable[Group]) -> None:
        """What was answered, for a fair share of the next prompts."""
        if self.lengths is not None:
            for group in groups:
                self.lengths.note(group)

    def sleep(self) -> None:
        """Where they share GPUs with the learner: until the next push."""
        if self.sleeps:
            self.wait_for([actor.sleep.remote() for actor in self.actors], "going to sleep")
            self._prepare()

    def begin_push(self, of: Sequence[int] | None = None) -> list[Any]:
        return [actor.begin_push.remote() for actor in self._those(of)]

    def load_weights(self, bucket: Any, of: Sequence[int] | None = None) -> list[Any]:
        return [actor.load_weights.remote(bucket) for actor in self._those(of)]

    def finish_push(self, version: int, buckets: int, of: Sequence[int] | None = None) -> list[Any]:
        """A reference to each engine's version after it."""
        return [actor.finish_push.remote(version, buckets) for actor in self._those(of)]

    def check_weights(self, *expected: Any, complete: bool, of: Sequence[int] | None = None) -> list[Any]:
        """A reference to what is wrong with each engine's weights; `expected`: digests, or references to them."""
        return [actor.check_weights.remote(complete, *expected) for actor in self._those(of)]

    def probe(self, prompts: Any, sampling: Sampling, candidates: int, of: Sequence[int] | None = None) -> list[Any]:
        """A reference to each engine's list of probes."""
        return [actor.probe.remote(prompts, sampling, candidates) for actor in self._those(of)]

    def _those(self, of: Sequence[int] | None) -> list[Any]:
        return self.actors if of is None else [self.actors[index] for index in of]

    def wait_for(self, calls: Sequence[Any], doing: str) -> list[Any]:
        """One call an actor, in their order."""
        return gather(calls, f"{_WHO} ({doing})", self.step_timeout_s)


def _unanswered(hand: Sequence[Prompt], came: Sequence[Any]) -> list[Prompt]:
    """Of an actor's prompts those whose groups it did not give, or took with it."""
    answered = set()
    for reference in came:
        try:
            group: Group = ray.get(reference)
        except RayError:
            continue
        answered.add(group.prompt.id)
    return [prompt for prompt in hand if prompt.id not in answered]
