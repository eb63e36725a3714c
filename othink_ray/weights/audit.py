"""Proof of arrival: after a push, engine and learner must give the same tokens the same logprobs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from othink_ray.types import Audit, Probe


class AuditError(RuntimeError):
    """The engines do not sample from the policy that is trained."""


def compare(probes: Sequence[Probe], known: Sequence[Probe], version: int) -> Audit:
    """Gaps in nats between both sides, over the likeliest tokens at each place of each probe.

    `known` is of one side, `probes` of one or several that were asked the same, in the same order. Candidates that only
    one of both has are left out, and so is what follows where the answers part.
    """
    gaps: list[float] = []
    for number, probe in enumerate(probes):
        other = known[number % len(known)]
        tokens, others = (one.group.completions[0].token_ids for one in (probe, other))
        for place in range(min(len(tokens), len(others))):
            here, there = (
                dict(zip(one.candidates[place].tolist(), one.logprobs[place].tolist(), strict=True))
                for one in (probe, other)
            )
            gaps += [abs(here[token] - there[token]) for token in here.keys() & there.keys()]
            if tokens[place] != others[place]:
                break
    found = np.array(gaps) if gaps else np.array([np.inf])
    worst = float(found.max()) if np.isfinite(found).all() else float("inf")
    return Audit(version=version, gap_mean=float(found.mean()), gap_max=worst, tokens=len(gaps))


def mostly_comparable(probes: Sequence[Probe], known: Sequence[Probe]) -> bool:
    """Of each probe by itself: one that shares nothing must not hide behind others that agree."""
    return all(
        2 * compare([probe], [known[number % len(known)]], 0).tokens >= probe.logprobs.size
        for number, probe in enumerate(probes)
    )


def repeated(probes: Sequence[Probe], logprobs: Sequence[NDArray[np.float32]]) -> list[Probe]:
    """The same answers and candidates, as another side sees them."""
    return [replace(probe, logprobs=own) for probe, own in zip(probes, logprobs, strict=True)]


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
