"""The learner's ranks, called together: their collectives make the loss of one rank the loss of all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from othink_ray.config.schema import LearnerConfig
from othink_ray.core.packing import plan
from othink_ray.engines.base import LearnerEngine, RendezvousInfo
from othink_ray.engines.vllm_transfer import NamedWeights, Sender
from othink_ray.runtime.actors import LearnerActor
from othink_ray.runtime.futures import ProcessLost, Streams, WorkersLost, gather
from othink_ray.runtime.placement import Placement
from othink_ray.types import Pack, UpdateRequest, UpdateStats


class LearnerLost(ProcessLost):
    """A rank died or hangs, and the others wait for it in a collective."""


class LearnerPool:
    """The learner's ranks as one object: a method calls every rank that takes part in it."""

    def __init__(
        self, make_engine: Callable[[RendezvousInfo], LearnerEngine], learner: LearnerConfig, placement: Placement
    ) -> None:
        self.learner = learner
        self.ranks = [placement.start(LearnerActor, "learner", rank) for rank in range(learner.world_size)]
        self.make_engine = make_engine

    def start(self) -> list[Any]:
        """Start loading on all ranks; return the references to pass to `wait`."""
        [(address, port)] = self.wait_for(
            [self.ranks[0].open_rendezvous.remote()], "loading", self.learner.load_timeout_s
        )
        self.rendezvous = [
            RendezvousInfo(rank=rank, world_size=len(self.ranks), master_address=address, master_port=port)
            for rank in range(len(self.ranks))
        ]
        return [
            actor.start.remote(self.make_engine, info) for actor, info in zip(self.ranks, self.rendezvous, strict=True)
        ]

    def wait(self, started: Sequence[Any]) -> list[str]:
        """Wait until every rank has loaded; return their warnings, each once."""
        return list(dict.fromkeys(chain(*self.wait_for(started, "loading", self.learner.load_timeout_s))))

    def update(self, request: UpdateRequest) -> UpdateStats:
        return self.finish_update(self.begin_update(request))

    def begin_update(self, request: UpdateRequest) -> list[Any]:
        """Start an update on packs balanced over the ranks; return the references to pass to `finish_update`.

        Calls issued meanwhile are queued on the ranks and run right after it.
        """
        return [
            actor.update.remote(shard, request.settings)
            for actor, shard in zip(self.ranks, self._shards(request), strict=True)
        ]

    def _shards(self, request: UpdateRequest) -> list[list[list[list[Pack]]]]:
        """Return the packs as [rank][update][micro-batch]."""
        packs, ranks = request.packs, len(self.ranks)
        planned = plan(packs, ranks=ranks, updates=request.updates, micro_tokens=self.learner.micro_tokens)
        return [
            [[[packs[index] for index in micro] for micro in update[rank]] for update in planned]
            for rank in range(ranks)
        ]

    def finish_update(self, begun: Sequence[Any]) -> UpdateStats:
        """Wait for an update and return its statistics: equal on all ranks except bad prompts, which are joined."""
        stats: list[UpdateStats] = self.wait_for(begun, "update")
        return replace(stats[0], bad_prompts=tuple(prompt for of_rank in stats for prompt in of_rank.bad_prompts))

    def prefetch(self, request: UpdateRequest) -> None:
        """Start to prefetch the weight-independent inputs of the next update, beside the update that runs.

        Errors of the prefetch are raised by the next update.
        """
        for actor, shard in zip(self.ranks, self._shards(request), strict=True):
            actor.prefetch.remote(shard, request.settings)

    def candidate_logprobs(self, probes: Any) -> list[Any]:
        """Return a reference per rank to the candidates' logprobs, equal on all ranks; `probes` may be a reference."""
        return [actor.candidate_logprobs.remote(probes) for actor in self.ranks]

    def pixel_digests(self, probes: Any) -> list[Any]:
        """Return one reference: digests of the probes' images as the learner sees them; `probes` may be a reference."""
        return [self.ranks[0].pixel_digests.remote(probes)]

    def buckets(self, bucket_bytes: int, in_flight: int) -> Iterator[Any]:
        """Return an iterator over references to the buckets of trained weights, at most `in_flight` gathered early.

        The gather is queued on all ranks at once: they begin as soon as they are free.
        """
        following = [actor.follow.remote() for actor in self.ranks[1:]]
        streaming = {"num_returns": "streaming", "_generator_backpressure_num_objects": in_flight}
        stream = self.ranks[0].buckets.options(**streaming).remote(bucket_bytes)
        return self._gathered(stream, following)

    def _gathered(self, stream: Any, following: Sequence[Any]) -> Iterator[Any]:
        streams = Streams({0: stream}, "the learner (gathering weights)", self.learner.step_timeout_s)
        yield from streams
        if streams.lost:
            raise LearnerLost(f"{streams.name} {streams.lost[0]}")
        self.wait_for(following, "gathering weights")

    def pushed_digests(self) -> list[Any]:
        """Return one reference: digests of the last push's weights, taken as they were gathered."""
        return [self.ranks[0].pushed_digests.remote()]

    def frozen_digests(self) -> list[Any]:
        """Return one reference per rank to the digests of all weights that are never pushed, equal on all ranks."""
        return [actor.frozen_digests.remote() for actor in self.ranks]

    def open_senders(self, make_sender: Callable[[RendezvousInfo, int, NamedWeights], Sender]) -> None:
        """Open vLLM's weight transfer on every rank, at a port of its own; return when the engines have joined."""
        [port] = self.wait_for([self.ranks[0].free_port.remote()], "opening the weight transfer")
        opened = [
            actor.open_sender.remote(partial(make_sender, info, port))
            for actor, info in zip(self.ranks, self.rendezvous, strict=True)
        ]
        self.wait_for(opened, "opening the weight transfer", self.learner.load_timeout_s)

    def send(self) -> None:
        self.wait_for([actor.send.remote() for actor in self.ranks], "sending weights")

    def export(self, folder: Path) -> None:
        self.wait_for([actor.export.remote(folder.absolute()) for actor in self.ranks], "export")

    def save(self, folder: Path) -> None:
        self.wait_for([actor.save.remote(folder.absolute()) for actor in self.ranks], "saving a checkpoint")

    def save_is_written(self) -> bool:
        return all(self.wait_for([actor.save_is_written.remote() for actor in self.ranks], "saving a checkpoint"))

    def finish_save(self) -> dict[str, str]:
        """Return SHA-256 by file of the checkpoint; raise OSError where a rank could not write its shard."""
        digests: dict[str, str] = {}
        for result in self.wait_for([actor.finish_save.remote() for actor in self.ranks], "saving a checkpoint"):
            if isinstance(result, str):
                raise OSError(result)
            digests |= result
        return digests

    def load(self, folder: Path) -> None:
        self.wait_for([actor.load.remote(folder.absolute()) for actor in self.ranks], "loading a checkpoint")

    def wait_for(self, calls: Sequence[Any], doing: str, timeout_s: float | None = None) -> list[Any]:
        try:
            return gather(calls, f"the learner ({doing})", timeout_s or self.learner.step_timeout_s)
        except WorkersLost as error:
            raise LearnerLost(str(error)) from error
