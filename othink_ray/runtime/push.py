"""Weights from the learner to every engine, and the audit that they arrived."""

from __future__ import annotations

from collections.abc import Sequence

from othink_ray.config.schema import WeightsConfig
from othink_ray.engines.base import Sampling
from othink_ray.runtime.pools import LearnerPool, RolloutPool
from othink_ray.types import Audit, Prompt
from othink_ray.weights.audit import AuditError, compare, require


class SharedMemoryPush:
    """Buckets through Ray's object store: shared memory on a node, one copy to each other node."""

    def __init__(self, learner: LearnerPool, rollout: RolloutPool, bucket_mb: int) -> None:
        self.learner, self.rollout, self.bucket_bytes = learner, rollout, bucket_mb * 2**20

    def send(self, version: int) -> list[int]:
        return self.rollout.load_weights(version, list(self.learner.chunks(self.bucket_bytes)))


class AuditedPush:
    """Sends one version and returns when every engine reports it and answers the probe as the learner does."""

    def __init__(
        self,
        transport: SharedMemoryPush,
        learner: LearnerPool,
        rollout: RolloutPool,
        weights: WeightsConfig,
        probe_prompts: Sequence[Prompt],
        temperature: float,
    ) -> None:
        self.transport, self.learner, self.rollout, self.weights = transport, learner, rollout, weights
        self.probe_prompts = list(probe_prompts)
        # The same prompts and seed on every push: what an engine wrongly remembers of them shows.
        self.sampling = Sampling(answers=1, max_tokens=weights.audit_tokens, temperature=temperature, seed=0)

    def __call__(self, version: int) -> Audit:
        reached = self.transport.send(version)
        if set(reached) != {version}:
            raise AuditError(f"engines report weights versions {reached} after a push of version {version}")
        probes = self.rollout.probe(self.probe_prompts, self.sampling, self.weights.audit_candidates)
        audit = compare(probes, self.learner.candidate_logprobs(probes), version)
        require(audit, self.weights.audit_tolerance)
        return audit
