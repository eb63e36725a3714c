"""Proof of arrival: after a push, engine and learner must give the same tokens the same logprobs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from othink_ray.types import Audit, Probe


class AuditError(RuntimeError):
    """The engines do not sample from the policy that is trained."""


def compare(probes: Sequence[Probe], learner_logprobs: Sequence[NDArray[np.float32]], version: int) -> Audit:
    """Gaps in nats between both sides, over the likeliest tokens at each place of each probe."""
    gaps = np.concatenate(
        [np.abs(probe.logprobs - own).ravel() for probe, own in zip(probes, learner_logprobs, strict=True)]
    )
    worst = float(gaps.max()) if np.isfinite(gaps).all() else float("inf")
    return Audit(version=version, gap_mean=float(gaps.mean()), gap_max=worst, tokens=gaps.size)


def compare_engines(probes: Sequence[Probe], audited: Sequence[Probe], version: int) -> Audit:
    """As `compare`, of engines that are new with one that was audited: both were asked the same, in the same order.

    Where two candidates are all but alike one may be listed or sampled there and the other here; what follows another
    token cannot be compared.
    """
    gaps: list[float] = []
    for place, probe in enumerate(probes):
        known = audited[place % len(audited)]
        tokens, others = (one.group.completions[0].token_ids for one in (probe, known))
        for at in range(min(len(tokens), len(others))):
            here, there = (
                dict(zip(one.candidates[at].tolist(), one.logprobs[at].tolist(), strict=True)) for one in (probe, known)
            )
            gaps += [abs(here[token] - there[token]) for token in here.keys() & there.keys()]
            if tokens[at] != others[at]:
                break
    found = np.array(gaps) if gaps else np.array([np.inf])
    return Audit(version=version, gap_mean=float(found.mean()), gap_max=float(found.max()), tokens=len(gaps))


def require(audit: Audit, tolerance: float) -> None:
    """Stops a run whose engines answer with other weights, pixels or tokens than the learner trains."""
    if audit.gap_mean <= tolerance and np.isfinite(audit.gap_max):
        return
    raise AuditError(
        f"audit of weights version {audit.version} failed: engine and learner differ by {audit.gap_mean:.3g} nats on "
        f"average and {audit.gap_max:.3g} at most over {audit.tokens} logprobs; weights.audit_tolerance = {tolerance}. "
        "Look at: a weight that did not arrive (a tied lm_head above all), caches kept over the push, "
        "other model.min_pixels or model.max_pixels, another dtype. With a lower precision than float32, "
        "raise weights.audit_tolerance (bfloat16 needs about 0.05)."
    )
