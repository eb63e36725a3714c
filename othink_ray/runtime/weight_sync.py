"""Weights from the learner to every engine, and the audit that they arrived."""

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
from othink_ray.weights.audit import AuditError, Tolerance, compare, mostly_comparable, repeated, require_pixels
from othink_ray.weights.digest import require_arrived


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """Calls under way on the engines, as references: loading, and then the version that each engine reports."""

    loading: Sequence[Sequence[Any]]  # one call an engine for each bucket
    versions: Sequence[Any]


_THUMBNAIL = 112  # pixels
_BUCKETS_AHEAD = 2  # gathered before they are asked for, and again so many on their way into an engine


class SharedMemoryPush:
    """Buckets through Ray's object store: shared memory on a node, one copy to each other node.

    The engines load one while the learner gathers the next. Those of the last push stay there, for an engine that
    comes in the place of another while the learner is already somewhere else.
    """

    def __init__(self, learner: LearnerPool, rollout: RolloutPool, bucket_mb: int) -> None:
        self.learner, self.rollout, self.bucket_bytes = learner, rollout, bucket_mb * 2**20
        self.gathering: Iterator[Any] | None = None
        self.kept: list[Any] = []

    def begin(self) -> None:
        assert self.gathering is None, "an update that was not pushed"
        self.gathering = self._gather()

    def _gather(self) -> Iterator[Any]:
        return self.learner.chunks(self.bucket_bytes, ahead=_BUCKETS_AHEAD)

    def send(self, version: int) -> Sent:
        buckets, self.gathering, self.kept = self.gathering or self._gather(), None, []
        lost: WorkersLost | None = None
        loading = [self.rollout.begin_push()]
        for bucket in buckets:
            self.kept.append(bucket)
            loading.append(self.rollout.load_weights(bucket))
            if len(loading) > _BUCKETS_AHEAD and lost is None:
                try:
                    self.rollout.wait_for(loading[-1 - _BUCKETS_AHEAD], "loading weights")
                except WorkersLost as error:
                    lost = error  # the learner must be heard out: all its ranks gather together
        if lost is not None:
            raise lost
        versions = self.rollout.finish_push(version, buckets=len(self.kept))
        return Sent(loading=loading, versions=versions)

    def send_again(self, version: int, to: Sequence[int] | None) -> Sent:
        loading = [self.rollout.begin_push(to), *(self.rollout.load_weights(bucket, to) for bucket in self.kept)]
        return Sent(loading=loading, versions=self.rollout.finish_push(version, len(self.kept), to))


class TransferPush:
    """vLLM's own transfer between GPUs: the learner's ranks send, the engines receive in place."""

    def __init__(self, backend: str, learner: LearnerPool, rollout: RolloutPool, bucket_mb: int) -> None:
        self.learner, self.rollout = learner, rollout
        engines = TransferClient(rollout.actors, rollout.processes_per_actor)
        receivers = len(rollout.actors) * rollout.processes_per_actor
        learner.open_senders(
            partial(_make_sender, backend, engines, receivers=receivers, bucket_bytes=bucket_mb * 2**20)
        )

    def begin(self) -> None:
        """Both ends must be there for a transfer."""

    def send(self, version: int) -> Sent:
        self.learner.send()
        return Sent(loading=[], versions=self.rollout.finish_push(version, buckets=0))

    def send_again(self, version: int, to: Sequence[int] | None) -> Sent:
        raise ProcessLost("an engine that is new cannot join a transfer between GPUs that is open: all start again")


def _make_sender(
    backend: str,
    engines: TransferClient,
    place: RendezvousInfo,
    port: int,
    named_weights: NamedWeights,
    *,
    receivers: int,
    bucket_bytes: int,
) -> Sender:
    return open_sender(
        backend, named_weights, engines, place, port=port, receivers=receivers, bucket_bytes=bucket_bytes
    )


class TransferClient:
    """The engines as vLLM's sender sees them: every call goes to all of them, and returns when all are done."""

    def __init__(self, actors: Sequence[Any], processes_per_actor: int) -> None:
        self.actors, self.processes_per_actor = list(actors), processes_per_actor

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """The sender is rank 0 of the transfer; the engines follow in order."""
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


class Transport(Protocol):
    """A way for one version of the policy to reach every engine."""

    def begin(self) -> None:
        """What can be done before the engines are ready, as soon as the learner has ended what it is at."""
        ...

    def send(self, version: int) -> Sent: ...

    def send_again(self, version: int, to: Sequence[int] | None) -> Sent:
        """What `send` sent last, to some engines or to all of them, without the learner."""
        ...


def open_transport(name: str, learner: LearnerPool, rollout: RolloutPool, bucket_mb: int) -> Transport:
    """`shared_memory`, or a backend of vLLM's transfer: `nccl`, `ipc`."""
    if name == "shared_memory":
        return SharedMemoryPush(learner, rollout, bucket_mb)
    return TransferPush(name, learner, rollout, bucket_mb)


@dataclass(frozen=True, slots=True, kw_only=True)
class Requested:
    """What engines are asked after a push, as references."""

    sent: Sent
    checks: Sequence[Any]  # what is wrong with each engine's weights
    probes: Sequence[Any]


class AuditedPush:
    """Sends one version and returns when every engine reports it, holds its very bits and answers as the learner does.

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
        # Only weights change from push to push: after the first one, which shows that both sides see the same pixels,
        # small images are enough. They are among the first ones too, so that what an engine keeps of them shows.
        quick = [with_thumbnails(prompt, _THUMBNAIL) for prompt in probe_prompts]
        self.quick_prompts = ray.put(quick)
        self.first_prompts = ray.put([*probe_prompts, *(new for new in quick if new not in probe_prompts)])
        # The same prompts and seed on every push: what an engine wrongly remembers of them shows.
        self.sampling = Sampling(answers=1, max_tokens=weights.audit_tokens, temperature=temperature, seed=0)
        self.prompts = self.audited_with = self.first_prompts
        self.version = -1
        self.audited: list[Probe] = []  # one engine's; the others answered like it
        self.pushed: Sequence[Any] = []  # references to digests
        self.frozen: Sequence[Any] = []
        rollout.sync_new_engines = self.sync_new_engines

    def begin(self) -> None:
        """The learner ends an update: the push of it follows."""
        self.transport.begin()

    def __call__(self, version: int) -> Audit:
        """An engine that is lost on the way is replaced, and all get the weights again."""
        self.version = version
        try:
            sent = self._send()
            audit = self._finish(sent, complete=self.prompts is self.first_prompts)
        except WorkersLost as failure:
            audit = self._finish_with_others(failure)
        self.prompts = self.quick_prompts
        return audit

    @span("send weights")
    def _send(self) -> Sent:
        try:
            return self.transport.send(self.version)
        finally:  # where an engine was lost too: the learner has gathered everything, and it is sent again
            self.pushed = self.learner.pushed_digests()
            self.frozen = self.frozen or self.learner.frozen_digests()

    def _finish_with_others(self, failure: WorkersLost) -> Audit:
        self.rollout.replace(failure, equipped=False)
        try:
            return self._finish(self.transport.send_again(self.version, None), complete=True)
        except WorkersLost as another:
            return self._finish_with_others(another)

    @span("audit")
    def _finish(self, sent: Sent, *, complete: bool) -> Audit:
        """Both sides at once: while the engines load, the learner says how likely their last answers are by now."""
        asked = self._ask(sent, self.prompts, complete=complete)
        last = self.audited if self.audited_with is self.prompts else []
        expected = self.learner.candidate_logprobs(last or asked.probes[0])
        pixels = [] if last else self.learner.pixel_digests(asked.probes[0])
        probes = self._arrived(asked)
        seen = self.learner.wait_for(pixels, "audit")[0] if pixels else [probe.pixels for probe in last]
        require_pixels(probes, seen, self.version)
        now = probes[: len(probes) // len(asked.probes)]  # of one engine
        known = self._by_learner(last or now, expected)
        if not mostly_comparable(probes, known):  # other answers than last time, or than the first engine's
            known = self._by_learner(probes, self.learner.candidate_logprobs(probes))
        audit = self.tolerance.require(compare(probes, known, self.version))
        self.audited, self.audited_with = now, self.prompts
        [pushed] = self.learner.wait_for(self.pushed, "audit")
        return replace(audit, verified=len(pushed), sent_bytes=sum(weight.nbytes for weight in pushed.values()))

    def _by_learner(self, answers: Sequence[Probe], logprobs: Sequence[Any]) -> list[Probe]:
        """The same answers as the learner sees them; `logprobs` are references to its own of their candidates."""
        return repeated(answers, self.learner.wait_for(logprobs, "audit")[0])

    def sync_new_engines(self, new: Sequence[int]) -> None:
        """New engines get what the others have and answer as they did: the learner may be further by now."""
        if self.version < 0:
            return
        asked = self._ask(self.transport.send_again(self.version, new), self.audited_with, complete=True, of=new)
        probes = self._arrived(asked)
        require_pixels(probes, [probe.pixels for probe in self.audited], self.version)
        self.tolerance.require(compare(probes, self.audited, self.version))

    def _ask(self, sent: Sent, prompts: Any, *, complete: bool, of: Sequence[int] | None = None) -> Requested:
        digests = [*self.pushed, *self.frozen[:1]] if complete else self.pushed
        return Requested(
            sent=sent,
            checks=self.rollout.check_weights(*digests, complete=complete, of=of),
            probes=self.rollout.probe(prompts, self.sampling, self.weights.audit_candidates, of),
        )

    def _arrived(self, asked: Requested) -> list[Probe]:
        for calls in asked.sent.loading:  # what failed first says why
            self.rollout.wait_for(calls, "loading weights")
        reached = self.rollout.wait_for(asked.sent.versions, "loading weights")
        if set(reached) != {self.version}:
            raise AuditError(f"engines report weights versions {reached} after a push of version {self.version}")
        self.learner.wait_for([*self.pushed, *self.frozen], "digesting weights")
        require_arrived(self.rollout.wait_for(asked.checks, "checking weights"), self.version)
        return list(chain.from_iterable(self.rollout.wait_for(asked.probes, "probe")))
