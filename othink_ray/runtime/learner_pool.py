"""The learner's ranks, called together: where one is lost, all are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from othink_ray.config.schema import LearnerConfig
from othink_ray.core.packing import plan
from othink_ray.engines.base import LearnerEngine, RendezvousInfo
from othink_ray.engines.vllm_transfer import NamedWeights, Sender
from othink_ray.runtime.actors import LearnerActor
from othink_ray.runtime.futures import ProcessLost, Streams, WorkersLost, gather
from othink_ray.runtime.placement import Placement
from othink_ray.types import Pack, UpdateStats


class LearnerLost(ProcessLost):
    """A rank died or hangs; the others wait for it in vain."""


class LearnerPool:
    """Every method is all ranks' together."""

    def __init__(
        self, make_engine: Callable[[RendezvousInfo], LearnerEngine], learner: LearnerConfig, placement: Placement
    ) -> None:
        self.learner = learner
        self.ranks = [placement.start(LearnerActor, "learner", rank) for rank in range(learner.world_size)]
        self.make_engine = make_engine

    def start(self) -> list[Any]:
        """Begin loading; wait for the references to know that it is done."""
        [(address, port)] = self.wait_for([self.ranks[0].open_meeting.remote()], "loading", self.learner.load_timeout_s)
        self.places = [
            RendezvousInfo(rank=rank, world_size=len(self.ranks), master_address=address, master_port=port)
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
        return self.updated(
            self.begin_update(packs, updates=updates, beta=beta, lr=lr, loss=loss, correction=correction)
        )

    def begin_update(
        self, packs: Sequence[Pack], *, updates: int, beta: float, lr: float, loss: str, correction: str
    ) -> list[Any]:
        """One batch of rows, balanced over ranks; what is asked of them meanwhile follows without a pause."""
        return [
            actor.update.remote(own, beta, lr, loss, correction)
            for actor, own in zip(self.ranks, self._shares(packs, updates), strict=True)
        ]

    def _shares(self, packs: Sequence[Pack], updates: int) -> list[list[list[list[Pack]]]]:
        """The rows by [rank][update][micro-batch]."""
        planned = plan(packs, ranks=len(self.ranks), updates=updates, micro_tokens=self.learner.micro_tokens)
        return [
            [[[packs[row] for row in micro] for micro in update[rank]] for update in planned]
            for rank in range(len(self.ranks))
        ]

    def updated(self, begun: Sequence[Any]) -> UpdateStats:
        """Statistics of the update: the same on every rank, but for the bad prompts, which are joined here."""
        stats: list[UpdateStats] = self.wait_for(begun, "update")
        return replace(stats[0], bad_prompts=tuple(prompt for own in stats for prompt in own.bad_prompts))

    def prepare(self, packs: Sequence[Pack], *, updates: int, with_reference: bool) -> None:
        """Begin, beside the update that runs, with what of the next one can be known by now.

        What goes wrong with that is the next update's to tell.
        """
        for actor, own in zip(self.ranks, self._shares(packs, updates), strict=True):
            actor.prepare.remote(own, with_reference)

    def candidate_logprobs(self, probes: Any) -> list[Any]:
        """For probes, or a reference to them: one to each rank's logprobs of their candidates, which are the same."""
        return [actor.candidate_logprobs.remote(probes) for actor in self.ranks]

    def pixel_digests(self, probes: Any) -> list[Any]:
        """One reference: the digests of the images of probes (or a reference to them), as the learner sees them."""
        return [self.ranks[0].pixel_digests.remote(probes)]

    def chunks(self, bucket_bytes: int, ahead: int) -> Iterator[Any]:
        """References to the buckets of what is trained, gathered at most `ahead` of them before they are asked for.

        The ranks begin with it as soon as they are free.
        """
        following = [actor.follow.remote() for actor in self.ranks[1:]]
        streaming = {"num_returns": "streaming", "_generator_backpressure_num_objects": ahead}
        stream = self.ranks[0].chunks.options(**streaming).remote(bucket_bytes)
        return self._gathered(stream, following)

    def _gathered(self, stream: Any, following: Sequence[Any]) -> Iterator[Any]:
        streams = Streams({0: stream}, "the learner (gathering weights)", self.learner.step_timeout_s)
        yield from streams
        if streams.lost:
            raise LearnerLost(f"{streams.who} {streams.lost[0]}")
        self.wait_for(following, "gathering weights")

    def pushed_digests(self) -> list[Any]:
        """One reference: the digests of the weights of the last push, taken as they were gathered."""
        return [self.ranks[0].pushed_digests.remote()]

    def frozen_digests(self) -> list[Any]:
        """One reference to each rank's digests of all weights that are never pushed, which are the same."""
        return [actor.frozen_digests.remote() for actor in self.ranks]

    def open_senders(self, make_sender: Callable[[RendezvousInfo, int, NamedWeights], Sender]) -> None:
        """Meet the engines on a port of their own."""
        [port] = self.wait_for([self.ranks[0].free_port.remote()], "opening the weight transfer")
        opened = [
            actor.open_sender.remote(partial(make_sender, place, port))
            for actor, place in zip(self.ranks, self.places, strict=True)
        ]
        self.wait_for(opened, "opening the weight transfer", self.learner.load_timeout_s)

    def send(self) -> None:
        self.wait_for([actor.send.remote() for actor in self.ranks], "sending weights")

    def export(self, folder: Path) -> None:
        self.wait_for([actor.export.remote(folder.absolute()) for actor in self.ranks], "export")

    def save(self, folder: Path) -> None:
        self.wait_for([actor.save.remote(folder.absolute()) for actor in self.ranks], "saving a checkpoint")

    def written(self) -> bool:
        return all(self.wait_for([actor.written.remote() for actor in self.ranks], "saving a checkpoint"))

    def saved(self) -> dict[str, str]:
        """SHA-256 by file; OSError where a rank could not write its share."""
        digests: dict[str, str] = {}
        for own in self.wait_for([actor.saved.remote() for actor in self.ranks], "saving a checkpoint"):
            if isinstance(own, str):
                raise OSError(own)
            digests |= own
        return digests

    def load(self, folder: Path) -> None:
        self.wait_for([actor.load.remote(folder.absolute()) for actor in self.ranks], "loading a checkpoint")

    def wait_for(self, calls: Sequence[Any], doing: str, timeout_s: float | None = None) -> list[Any]:
        try:
            return gather(calls, f"the learner ({doing})", timeout_s or self.learner.step_timeout_s)
        except WorkersLost as error:
            raise LearnerLost(str(error)) from error
