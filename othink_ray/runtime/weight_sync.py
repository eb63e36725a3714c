"""Push of the learner's weights to every engine, and the audit that they arrived."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any, Protocol

import ray

from othink_ray.config.schema import WeightsConfig
from othink_ray.data.prompts import with_thumbnails
from othink_ray.engines.base import RendezvousInfo, Sampling
from othink_ray.engines.vllm_transfer import NamedWeights, Sender, open_sender
from othink_ray.runtime.futures import ProcessLost, WorkersLost
from othink_ray.runtime.learner_pool import LearnerPool
from othink_ray.runtime.rollout_pool import RolloutPool
from othink_ray.tracing import span
from othink_ray.types import Audit, Probe, Prompt
from othink_ray.weights import (
    AuditError,
    Tolerance,
    compare,
    mostly_comparable,
    repeated,
    require_arrived,
    require_pixels,
)

_THUMBNAIL = 112  # pixels of the longer side
_BUCKETS_IN_FLIGHT = 2  # gathered but not yet consumed, and as many again on their way into an engine


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """References to the engine calls of a push: bucket loads, then the version that each engine reports."""

    loading: Sequence[Sequence[Any]]  # per bucket, one call per engine
    versions: Sequence[Any]


class Transport(Protocol):
    """Sends one version of the weights to every engine."""

    def begin(self) -> None:
        """Queue what can run before the engines are ready, right behind the learner's current call."""
        ...

    def send(self, version: int) -> Sent: ...

    def send_again(self, version: int, engines: Sequence[int] | None) -> Sent:
        """Repeat the last `send` to some engines (None: all), without the learner."""
        ...


def open_transport(name: str, learner: LearnerPool, rollout: RolloutPool, bucket_mb: int) -> Transport:
    """Return the transport `shared_memory`, or one over a backend of vLLM's weight transfer: `nccl`, `ipc`."""
    if name == "shared_memory":
        return SharedMemoryPush(learner, rollout, bucket_mb)
    return TransferPush(name, learner, rollout, bucket_mb)


class SharedMemoryPush:
    """Sends buckets through Ray's object store: shared memory on a node, one copy to each other node.

    The engines load a bucket while the learner gathers the next. The buckets of the last push are kept, for an engine
    that is restarted while the learner is already ahead.
    """

    def __init__(self, learner: LearnerPool, rollout: RolloutPool, bucket_mb: int) -> None:
        self.learner, self.rollout, self.bucket_bytes = learner, rollout, bucket_mb * 2**20
        self.gathering: Iterator[Any] | None = None
        self.kept: list[Any] = []

    def begin(self) -> None:
        assert self.gathering is None, "the previous update was not pushed"
        self.gathering = self._gather()

    def _gather(self) -> Iterator[Any]:
        return self.learner.buckets(self.bucket_bytes, in_flight=_BUCKETS_IN_FLIGHT)

    def send(self, version: int) -> Sent:
        buckets, self.gathering, self.kept = self.gathering or self._gather(), None, []
        lost: WorkersLost | None = None
        loading = [self.rollout.begin_push()]
        for bucket in buckets:
            self.kept.append(bucket)
            loading.append(self.rollout.load_weights(bucket))
            if len(loading) > _BUCKETS_IN_FLIGHT and lost is None:
                try:
                    self.rollout.wait_for(loading[-1 - _BUCKETS_IN_FLIGHT], "loading weights")
                except WorkersLost as error:
                    lost = error  # but drain the learner's stream: all its ranks are inside a collective gather
        if lost is not None:
            raise lost
        versions = self.rollout.finish_push(version, buckets=len(self.kept))
        return Sent(loading=loading, versions=versions)

    def send_again(self, version: int, engines: Sequence[int] | None) -> Sent:
        loading = [
            self.rollout.begin_push(engines),
            *(self.rollout.load_weights(bucket, engines) for bucket in self.kept),
        ]
        return Sent(loading=loading, versions=self.rollout.finish_push(version, len(self.kept), engines))


class TransferPush:
    """Sends by vLLM's weight transfer between GPUs: the learner's ranks send, the engines receive in place."""

    def __init__(self, backend: str, learner: LearnerPool, rollout: RolloutPool, bucket_mb: int) -> None:
        self.learner, self.rollout = learner, rollout
        engines = TransferClient(rollout.actors, rollout.processes_per_actor)
        receivers = len(rollout.actors) * rollout.processes_per_actor
        learner.open_senders(
            partial(_make_sender, backend, engines, receivers=receivers, bucket_bytes=bucket_mb * 2**20)
        )

    def begin(self) -> None:
        """Do nothing: a transfer needs both ends at once."""

    def send(self, version: int) -> Sent:
        self.learner.send()
        return Sent(loading=[], versions=self.rollout.finish_push(version, buckets=0))

    def send_again(self, version: int, engines: Sequence[int] | None) -> Sent:
        raise ProcessLost("a restarted engine cannot join an open GPU weight transfer: restarting all processes")


class TransferClient:
    """The engines' side of vLLM's sender: forwards each call to all engines and returns when all are done."""

    def __init__(self, actors: Sequence[Any], processes_per_actor: int) -> None:
        self.actors, self.processes_per_actor = list(actors), processes_per_actor

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Open the transfer: the sender is rank 0, the engines' processes follow in order."""
        infos = [dict(init_info) for _ in self.actors]
        if "rank_offset" in init_info:
            each = self.processes_per_actor
            infos = [info | {"rank_offset": 1 + index * each} for index, info in enumerate(infos)]
        ray.get(
            [
                actor.transfer.remote("init_weight_transfer_engine", info)
                for actor, info in zip(self.actors, infos, strict=True)
            ]
        )

    def start_weight_update(self) -> None:
        self._all("start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        self._all("update_weights", update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._all("finish_weight_update")

    def _all(self, verb: str, *arguments: Any) -> None:
        ray.get([actor.transfer.remote(verb, *arguments) for actor in self.actors])


def _make_sender(
    backend: str,
    engines: TransferClient,
    rendezvous: RendezvousInfo,
    port: int,
    named_weights: NamedWeights,
    *,
    receivers: int,
    bucket_bytes: int,
) -> Sender:
    return open_sender(
        backend, named_weights, engines, rendezvous, port=port, receivers=receivers, bucket_bytes=bucket_bytes
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditCalls:
    """References to the engine calls that audit a push."""

    sent: Sent
    checks: Sequence[Any]  # wrong weights of each engine
    probes: Sequence[Any]


class AuditedPush:
    """Sends one version; returns when every engine reports it, holds equal bits and agrees with the learner's logprobs.

    Weights that are never pushed are checked once on each engine.
    """

    def __init__(
        self,
        transport: Transport,
        learner: LearnerPool,
        rollout: RolloutPool,
        weights: WeightsConfig,
        probe_prompts: Sequence[Prompt],
        temperature: float,
        tolerance: Tolerance,
    ) -> None:
        self.transport, self.learner, self.rollout, self.weights = transport, learner, rollout, weights
        self.tolerance = tolerance
        # Only weights change from push to push: the first push shows that both sides see the same pixels, and small
        # images are enough after it. The first push uses the small ones too, so that stale caches of them show later.
        quick = [with_thumbnails(prompt, _THUMBNAIL) for prompt in probe_prompts]
        self.quick_prompts = ray.put(quick)
        self.first_prompts = ray.put([*probe_prompts, *(new for new in quick if new not in probe_prompts)])
        # Equal prompts and seed on every push expose caches that an engine wrongly keeps over it.
        self.sampling = Sampling(answers=1, max_tokens=weights.audit_tokens, temperature=temperature, seed=0)
        self.prompts = self.audited_with = self.first_prompts
        self.version = -1
        self.audited: list[Probe] = []  # of the first engine; the others agreed with it
        self.pushed: Sequence[Any] = []  # references to digests
        self.frozen: Sequence[Any] = []

    def begin(self) -> None:
        """Queue the gather of the weights behind the learner's running update; `__call__` then pushes them."""
        self.transport.begin()

    def __call__(self, version: int) -> Audit:
        """Push and audit one version; if an engine is lost on the way, replace it and send to all engines again."""
        self.version = version
        try:
            sent = self._send()
            audit = self._audit(sent, complete=self.prompts is self.first_prompts)
        except WorkersLost as failure:
            audit = self._retry(failure)
        self.prompts = self.quick_prompts
        return audit

    @span("send weights")
    def _send(self) -> Sent:
        try:
            return self.transport.send(self.version)
        finally:  # also after the loss of an engine: the learner has gathered everything, and it is sent again
            self.pushed = self.learner.pushed_digests()
            self.frozen = self.frozen or self.learner.frozen_digests()

    def _retry(self, failure: WorkersLost) -> Audit:
        self.rollout.replace(failure)
        try:
            return self._audit(self.transport.send_again(self.version, None), complete=True)
        except WorkersLost as another:
            return self._retry(another)

    @span("audit")
    def _audit(self, sent: Sent, *, complete: bool) -> Audit:
        """Return the comparison of both sides; the learner scores the last push's probes while the engines load."""
        requested = self._request(sent, self.prompts, complete=complete)
        last = self.audited if self.audited_with is self.prompts else []
        expected = self.learner.candidate_logprobs(last or requested.probes[0])
        pixels = [] if last else self.learner.pixel_digests(requested.probes[0])
        probes = self._collect(requested)
        seen = self.learner.wait_for(pixels, "audit")[0] if pixels else [probe.pixels for probe in last]
        require_pixels(probes, seen, self.version)
        now = probes[: len(probes) // len(requested.probes)]  # of the first engine
        known = self._learner_probes(last or now, expected)
        if not mostly_comparable(probes, known):  # the answers differ from the last push, or from the first engine
            known = self._learner_probes(probes, self.learner.candidate_logprobs(probes))
        audit = self.tolerance.require(compare(probes, known, self.version))
        self.audited, self.audited_with = now, self.prompts
        [pushed] = self.learner.wait_for(self.pushed, "audit")
        return replace(audit, verified=len(pushed), sent_bytes=sum(weight.nbytes for weight in pushed.values()))

    def _learner_probes(self, probes: Sequence[Probe], logprobs: Sequence[Any]) -> list[Probe]:
        """Return the probes with the learner's logprobs of their candidates, given as references."""
        return repeated(probes, self.learner.wait_for(logprobs, "audit")[0])

    def sync_new_engines(self, new: Sequence[int]) -> None:
        """Send new engines the last push and compare them with its audit: the learner may be ahead by now."""
        if self.version < 0:
            return
        sent = self.transport.send_again(self.version, new)
        requested = self._request(sent, self.audited_with, complete=True, engines=new)
        probes = self._collect(requested)
        require_pixels(probes, [probe.pixels for probe in self.audited], self.version)
        self.tolerance.require(compare(probes, self.audited, self.version))

    def _request(self, sent: Sent, prompts: Any, *, complete: bool, engines: Sequence[int] | None = None) -> AuditCalls:
        digests = [*self.pushed, *self.frozen[:1]] if complete else self.pushed
        return AuditCalls(
            sent=sent,
            checks=self.rollout.check_weights(*digests, complete=complete, engines=engines),
            probes=self.rollout.probe(prompts, self.sampling, self.weights.audit_candidates, engines),
        )

    def _collect(self, requested: AuditCalls) -> list[Probe]:
        """Return the probes of all engines, after the checks of their versions and weights."""
        for calls in requested.sent.loading:  # the first failure names the cause
            self.rollout.wait_for(calls, "loading weights")
        reached = self.rollout.wait_for(requested.sent.versions, "loading weights")
        if set(reached) != {self.version}:
            raise AuditError(f"engines report weights versions {reached} after a push of version {self.version}")
        self.learner.wait_for([*self.pushed, *self.frozen], "digesting weights")
        require_arrived(self.rollout.wait_for(requested.checks, "checking weights"), self.version)
        return list(chain.from_iterable(self.rollout.wait_for(requested.probes, "probe")))
