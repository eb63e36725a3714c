"""Ray actor classes for rollout engines and learner ranks: thin wrappers that forward each call to their engine."""

from __future__ import annotations

import os
import socket
import time
import warnings
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import psutil
import ray
from numpy.typing import NDArray
from torch import Tensor

from othink_ray.cpu.kernels import SlowerKernel
from othink_ray.engines.base import LearnerEngine, RendezvousInfo, RolloutEngine, Sampling, rendezvous_store
from othink_ray.engines.vllm_transfer import NamedWeights, Sender
from othink_ray.runtime.futures import TracedActor
from othink_ray.tracing import record_span, span
from othink_ray.types import Group, Pack, PixelDigest, Probe, Prompt, UpdateSettings, UpdateStats
from othink_ray.weights import Bucket, DigestCollector, TensorDigest, digests, from_buckets, to_buckets

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

    @span("prefetch")
    def prefetch(self, prompts: Sequence[Prompt]) -> None:
        self.engine.prefetch(prompts)

    def sleep(self) -> None:
        self.engine.sleep()

    def begin_push(self) -> None:
        self.engine.begin_push()

    @span("load weights")
    def load_weights(self, bucket: Bucket) -> None:
        self.engine.load_weights(from_buckets([bucket]))

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
    """Actor around one learner rank: calls run one at a time, except `prefetch`, which runs beside them."""

    concurrency_groups: ClassVar = {BACKGROUND: 1}
    engine: LearnerEngine
    sender: Sender
    pushed = DigestCollector()  # digests of the last push

    def open_rendezvous(self) -> tuple[str, int]:
        """Open the rendezvous of all ranks on this node; return its address and port."""
        address = ray.util.get_node_ip_address()
        self.store = rendezvous_store(address)  # keeps the rendezvous open
        return address, self.store.port

    def free_port(self) -> int:
        """Return a free port for vLLM's weight transfer, which opens its rendezvous itself."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return int(probe.getsockname()[1])

    def start(self, make_engine: Callable[[RendezvousInfo], LearnerEngine], rendezvous: RendezvousInfo) -> list[str]:
        """Load the engine; return its warnings about slower kernels, for the driver to show."""
        # By default gloo resolves the hostname, often to 127.0.0.1, which ranks on other nodes cannot reach.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", _interface_with(ray.util.get_node_ip_address()))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", SlowerKernel)
            self.engine = make_engine(rendezvous)
        for other in caught:
            if other.category is not SlowerKernel:
                warnings.showwarning(other.message, other.category, other.filename, other.lineno)
        return [str(warning.message) for warning in caught if warning.category is SlowerKernel]

    @span("update")
    def update(self, updates: Sequence[Sequence[Sequence[Pack]]], settings: UpdateSettings) -> UpdateStats:
        return self.engine.update(updates, settings)

    @ray.method(concurrency_group=BACKGROUND)  # type: ignore[untyped-decorator]
    def prefetch(self, updates: Sequence[Sequence[Sequence[Pack]]], settings: UpdateSettings) -> None:
        self.engine.prefetch(updates, settings)

    @span("audit")
    def candidate_logprobs(self, probes: Sequence[Probe]) -> list[NDArray[np.float32]]:
        return self.engine.candidate_logprobs(probes)

    def pixel_digests(self, probes: Sequence[Probe]) -> list[PixelDigest]:
        return self.engine.pixel_digests(probes)

    def buckets(self, bucket_bytes: int) -> Iterator[Bucket | None]:
        """Yield the trained weights in buckets, then None; under ZeRO-3 the other ranks must run `follow` meanwhile."""
        with span("gather weights"):
            yield from to_buckets(self._digested_weights(), bucket_bytes)
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
        """Take part in the collective gather of `buckets`, as a rank that keeps nothing."""
        for _ in self.engine.named_weights():
            pass
        self.engine.release_memory()

    @span("export")
    def export(self, folder: Path) -> None:
        self.engine.export(folder)

    @span("copy for a checkpoint")
    def save(self, folder: Path) -> None:
        self.engine.save(folder)

    def save_is_written(self) -> bool:
        return self.engine.save_is_written()

    def finish_save(self) -> dict[str, str] | str:
        """Return SHA-256 by file, or the error text: a full disk must not count as a failure of the rank."""
        try:
            return self.engine.finish_save()
        except OSError as error:
            return str(error)

    def load(self, folder: Path) -> None:
        self.engine.load(folder)


def _interface_with(address: str) -> str:
    """Return the name of the network interface with `address`, "lo" if there is none."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in addresses):
            return name
    return "lo"
