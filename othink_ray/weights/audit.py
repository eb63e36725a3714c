"""Second proof of arrival: after a push, engine and learner give the same tokens the same logprobs, but for rounding.

The first one (`arrival`) compares weights to the bit; this one sees what else makes a policy: pixels, tokens,
positions, temperature, caches kept over the push, and the arithmetic itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from othink_ray.types import Audit, PixelDigest, Probe


class AuditError(RuntimeError):
    """The engines do not sample from the policy that is trained."""


def compare(probes: Sequence[Probe], known: Sequence[Probe], version: int) -> Audit:
    """Gaps in nats between both sides, over the likeliest tokens at each place of each probe.

    `known` is of one side, `probes` of one or several that were asked the same, in the same order. Candidates that only
    one of both has are left out, and so is what follows where the answers part.
    """
    gaps: list[float] = []
    sizes: list[float] = []
    for number, probe in enumerate(probes):
        other = known[number % len(known)]
        tokens, others = (one.group.completions[0].token_ids for one in (probe, other))
        for place in range(min(len(tokens), len(others))):
            here, there = (
                dict(zip(one.candidates[place].tolist(), one.logprobs[place].tolist(), strict=True))
                for one in (probe, other)
            )
            common = here.keys() & there.keys()
            gaps += [abs(here[token] - there[token]) for token in common]
            sizes += [abs(there[token]) for token in common]
            if tokens[place] != others[place]:
                break
    found = np.array(gaps) if gaps else np.array([np.inf])
    worst = float(found.max()) if np.isfinite(found).all() else float("inf")
    return Audit(
        version=version,
        gap_mean=float(found.mean()),
        gap_max=worst,
        tokens=len(gaps),
        logp_mean=float(np.mean(sizes)) if sizes else 0.0,
    )


def mostly_comparable(probes: Sequence[Probe], known: Sequence[Probe]) -> bool:
    """Of each probe by itself: one that shares nothing must not hide behind others that agree."""
    return all(
        2 * compare([probe], [known[number % len(known)]], 0).tokens >= probe.logprobs.size
        for number, probe in enumerate(probes)
    )


def repeated(probes: Sequence[Probe], logprobs: Sequence[NDArray[np.float32]]) -> list[Probe]:
    """The same answers and candidates, as another side sees them."""
    return [replace(probe, logprobs=own) for probe, own in zip(probes, logprobs, strict=True)]


def require_pixels(probes: Sequence[Probe], known: Sequence[PixelDigest], version: int) -> None:
    """Stops a run whose engines see other images than the learner: `known`, of prompts in the order of `compare`."""
    for number, probe in enumerate(probes):
        if probe.pixels != known[number % len(known)]:
            raise AuditError(
                f"audit of weights version {version} failed: engine and learner see other pixels in the images of "
                f"prompt {probe.group.prompt.id}. The weights were compared to the bit and are the learner's. Look at: "
                "other model.min_pixels or model.max_pixels, another image processor"
            )


_EPS = {"float32": 2.0**-23, "bfloat16": 2.0**-7}
# What rounding may do to a logprob, in eps x sqrt(layers) x |logprob|: each layer adds an error of its own to the last
# hidden state, and logits are its products. bfloat16 rounds results of sums that were made in float32; in float32 the
# sums themselves round, once for each of hundreds of terms, in an order that differs by processor. Measured on 3 to 32
# layers, on two processors: up to 3.5 and up to 0.23.
_ROUNDING = {"float32": 8.0, "bfloat16": 0.5}
_AS_MEASURED = 8.0  # times the gap of the first push: later ones, over other tokens, vary by a factor of 3
_LEAST = 0.5  # of the bound: a first gap that happens to be tiny is no promise


class Tolerance:
    """The largest mean gap in nats that passes an audit.

    It follows from precision and depth, until the first push has passed: then from the gap measured there, where
    weights were equal to the bit. It grows with the logprobs, whose rounding is relative. A fixed one replaces it.
    """

    def __init__(self, dtype: str, layers: int, fixed: float | None = None) -> None:
        self.fixed = fixed
        self.bound = _ROUNDING[dtype] * _EPS[dtype] * math.sqrt(layers)  # per nat of |logprob|
        self.measured: float | None = None  # at the first push, per nat of |logprob|

    def of(self, audit: Audit) -> float:
        if self.fixed is not None:
            return self.fixed
        relative = self.bound
        if self.measured is not None:
            relative = min(self.bound, max(_AS_MEASURED * self.measured, _LEAST * self.bound))
        return relative * _size(audit)

    def require(self, audit: Audit) -> Audit:
        """The audit with its tolerance; stops a run whose engines see other pixels or tokens than the learner."""
        tolerance = self.of(audit)
        if not (audit.gap_mean <= tolerance and np.isfinite(audit.gap_max)):
            raise AuditError(
                f"audit of weights version {audit.version} failed: engine and learner differ by "
                f"{audit.gap_mean:.3g} nats on average and {audit.gap_max:.3g} at most over {audit.tokens} logprobs, "
                f"tolerance {tolerance:.3g} ({self._origin()}). The weights were compared to the bit and are the "
                "learner's, and so are the pixels. Look at: caches kept over the push, another rollout.temperature, a "
                "model that vLLM and transformers compute differently. If it is rounding, set weights.audit_tolerance"
            )
        if self.measured is None:
            self.measured = audit.gap_mean / _size(audit)
        return replace(audit, tolerance=tolerance)

    def _origin(self) -> str:
        if self.fixed is not None:
            return "weights.audit_tolerance"
        return "from precision and depth" if self.measured is None else "from the gap at the first push"


def _size(audit: Audit) -> float:
    """The mean |logprob|; where all are near 0, rounding is not."""
    return max(1.0, audit.logp_mean)
