"""Ray actor classes for rollout engines and learner ranks: thin wrappers that forward each call to their engine."""

from __future__ import annotations

import os
import socket
import time
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import psutil
import ray
from numpy.typing import NDArray
from torch import Tensor

from othink_ray.engines.base import LearnerEngine, RendezvousInfo, RolloutEngine, Sampling, rendezvous_info
from othink_ray.engines.vllm_transfer import NamedWeights, Sender
from othink_ray.runtime.futures import TracedActor
from othink_ray.tracing import record_span, span
from othink_ray.types import Group, Pack, PixelDigest, Probe, Prompt, UpdateStats
from othink_ray.weights.buckets import Chunk, from_chunks, to_chunks
from othink_ray.weights.digest import DigestCollector, TensorDigest, digests

BACKGROUND = "background"  # concurrency group of methods that run beside the actor's main thread


class RolloutActor(TracedActor):
    """Actor around one rollout engine."""

    def __init__(self, make_engine: Callable[[], RolloutEngine]) -> None:
        self.engine = make_engine()

    def ready(self) -> int:
        return os.getpid()

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[Group | None]:
        with span("generate", prompts=len(prompts), answers=sampling.answers):
            start_s = time.time()
            for group in self.engine.generate(prompts, sampling):
                record_span("group", start_s, overlaps=True, prompt=group.prompt.id, version=group.version)
                yield group
        yield None  # end marker, see Streams

    @span("prepare")
    def prepare(self, prompts: Sequence[Prompt]) -> None:
        self.engine.prepare(prompts)

    def sleep(self) -> None:
        self.engine.sleep()

    def begin_push(self) -> None:
        self.engine.begin_push()

    @span("load weights")
    def load_weights(self, bucket: Chunk) -> None:
        self.engine.load_weights(from_chunks([bucket]))

    @span("finish push")
    def finish_push(self, version: int, buckets: int) -> int:
        self.engine.finish_push(version, buckets)
        return self.engine.version

    def transfer(self, verb: str, *arguments: Any) -> None:
        """Call a method of vLLM's weight transfer; only for engines that were opened with a transfer backend."""
        engine: Any = self.engine
        engine.transfer(verb, *arguments)

    @span("check weights")
    def check_weights(self, complete: bool, *expected: Mapping[str, TensorDigest]) -> dict[str, str]:
        return self.engine.check_weights(dict(ChainMap(*map(dict, expected))), complete=complete)

    @span("probe")
    def probe(self, prompts: Sequence[Prompt], sampling: Sampling, candidates: int) -> list[Probe]:
        return self.engine.probe(prompts, sampling, candidates)


class LearnerActor(TracedActor):
    """Actor around one learner rank: calls run one at a time, except `prepare`, which runs beside them."""

    concurrency_groups: ClassVar = {BACKGROUND: 1}
    engine: LearnerEngine
    sender: Sender
    pushed = DigestCollector()  # digests of the last push

    def open_rendezvous(self) -> tuple[str, int]:
        """Reserve the rendezvous of all ranks on this node: (address, port)."""
        address = ray.util.get_node_ip_address()
        self.store = rendezvous_info(address)  # keeps the rendezvous open
        return address, self.store.port

    def free_port(self) -> int:
        """Return a free port for vLLM's weight transfer, which opens its rendezvous itself."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return int(probe.getsockname()[1])

    def start(self, make_engine: Callable[[RendezvousInfo], LearnerEngine], rendezvous: RendezvousInfo) -> int:
        # By default gloo resolves the hostname, often to 127.0.0.1, which ranks on other nodes cannot reach.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", _interface_with(ray.util.get_node_ip_address()))
        self.engine = make_engine(rendezvous)
        return os.getpid()

    @span("update")
    def update(
        self, updates: Sequence[Sequence[Sequence[Pack]]], beta: float, lr: float, loss: str, correction: str
    ) -> UpdateStats:
        return self.engine.update(updates, beta=beta, lr=lr, loss=loss, correction=correction)

    @ray.method(concurrency_group=BACKGROUND)  # type: ignore[untyped-decorator]
    def prepare(self, updates: Sequence[Sequence[Sequence[Pack]]], with_reference: bool) -> None:
        self.engine.prepare(updates, with_reference=with_reference)

    @span("audit")
    def candidate_logprobs(self, probes: Sequence[Probe]) -> list[NDArray[np.float32]]:
        return self.engine.candidate_logprobs(probes)

    def pixel_digests(self, probes: Sequence[Probe]) -> list[PixelDigest]:
        return self.engine.pixel_digests(probes)

    def chunks(self, bucket_bytes: int) -> Iterator[Chunk | None]:
        """Yield the trained weights in buckets, then None; under ZeRO-3 the other ranks must run `follow` meanwhile."""
        with span("gather weights"):
            yield from to_chunks(self._digested_weights(), bucket_bytes)
        self.engine.release_memory()
        yield None  # end marker, see Streams

    def _digested_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Digest the weights as the engine yields them, before anything else reads them: later corruption shows."""
        self.pushed = DigestCollector()
        return self.pushed.passing(self.engine.named_weights())

    @span("digest weights")
    def pushed_digests(self) -> dict[str, TensorDigest]:
        return self.pushed.digests()

    @span("digest weights")
    def frozen_digests(self) -> dict[str, TensorDigest]:
        """Return the digests of all weights that are never pushed; a collective call of all ranks."""
        return digests(self.engine.frozen_weights())

    def open_sender(self, make_sender: Callable[[NamedWeights], Sender]) -> None:
        self.sender = make_sender(self._digested_weights)

    @span("send weights")
    def send(self) -> None:
        """Send the weights, then release memory: the engines wake their KV caches when they finish the push."""
        self.sender.send_weights()
        self.engine.release_memory()

    @span("gather weights")
    def follow(self) -> None:
        """Take part in the collective gather of `chunks`, as a rank that keeps nothing."""
        for _ in self.engine.named_weights():
            pass
        self.engine.release_memory()

    @span("export")
    def export(self, folder: Path) -> None:
        self.engine.export(folder)

    @span("copy for a checkpoint")
    def save(self, folder: Path) -> None:
        self.engine.save(folder)

    def written(self) -> bool:
        return self.engine.written()

    def saved(self) -> dict[str, str] | str:
        """Return SHA-256 by file, or the error text: a full disk must not count as a failure of the rank."""
        try:
            return self.engine.saved()
        except OSError as error:
            return str(error)

    def load(self, folder: Path) -> None:
        self.engine.load(folder)


def _interface_with(address: str) -> str:
    """Return the name of the network interface that has `address`; "lo" where none has."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in addresses):
            return name
    return "lo"
