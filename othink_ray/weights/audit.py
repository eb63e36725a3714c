"""Audit after a push: engine and learner must give the same tokens the same logprobs, up to rounding.

`transfer` compares weights bit for bit; the audit covers everything else that determines the policy: pixels, tokens,
positions, temperature, caches kept across the push, and the arithmetic itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from othink_ray.types import Audit, PixelDigest, Probe

_EPS = {"float32": 2.0**-23, "bfloat16": 2.0**-7}
# Bound on the rounding error of a logprob, in eps x sqrt(layers) x |logprob|: each layer adds independent errors to the
# last hidden state, and logits are linear in it. bfloat16 rounds the results of float32 sums; in float32 the sums
# themselves round, once for each of hundreds of terms, in an order that depends on the processor. Measured on 3 to 32
# layers, on two processors: up to 3.5 (float32) and up to 0.23 (bfloat16).
_ROUNDING = {"float32": 8.0, "bfloat16": 0.5}
_AS_MEASURED = 8.0  # times the gap at the first push: later gaps, over other tokens, vary by a factor of 3
_LEAST = 0.5  # fraction of the bound that always passes: the first gap may be small by chance


class AuditError(RuntimeError):
    """Raised when the engines do not sample from the policy that is trained."""


def compare(probes: Sequence[Probe], known: Sequence[Probe], version: int) -> Audit:
    """Return the gaps in nats between two sides, over the candidate tokens at each position of each probe.

    `known` holds one side's probes, `probes` those of one or several engines that got the same prompts, in the same
    order. Candidates that only one side has are skipped, and so are the positions after the answers diverge.
    """
    gaps: list[float] = []
    sizes: list[float] = []
    for number, probe in enumerate(probes):
        other = known[number % len(known)]
        tokens, other_tokens = (side.group.completions[0].token_ids for side in (probe, other))
        for position in range(min(len(tokens), len(other_tokens))):
            found, expected = (
                dict(zip(side.candidates[position].tolist(), side.logprobs[position].tolist(), strict=True))
                for side in (probe, other)
            )
            common = found.keys() & expected.keys()
            gaps += [abs(found[token] - expected[token]) for token in common]
            sizes += [abs(expected[token]) for token in common]
            if tokens[position] != other_tokens[position]:
                break
    all_gaps = np.array(gaps) if gaps else np.array([np.inf])
    worst = float(all_gaps.max()) if np.isfinite(all_gaps).all() else float("inf")
    return Audit(
        version=version,
        gap_mean=float(all_gaps.mean()),
        gap_max=worst,
        tokens=len(gaps),
        logp_mean=float(np.mean(sizes)) if sizes else 0.0,
    )


def mostly_comparable(probes: Sequence[Probe], known: Sequence[Probe]) -> bool:
    """Return whether at least half of the candidates of every single probe can be compared.

    Checked per probe: one with nothing in common must not be hidden by others that agree.
    """
    return all(
        2 * compare([probe], [known[number % len(known)]], 0).tokens >= probe.logprobs.size
        for number, probe in enumerate(probes)
    )


def repeated(probes: Sequence[Probe], logprobs: Sequence[NDArray[np.float32]]) -> list[Probe]:
    """Return the probes with their logprobs replaced by those of another side, for the same answers and candidates."""
    return [replace(probe, logprobs=values) for probe, values in zip(probes, logprobs, strict=True)]


def require_pixels(probes: Sequence[Probe], known: Sequence[PixelDigest], version: int) -> None:
    """Raise AuditError if an engine sees other pixels than the learner (`known`, in the prompt order of `compare`)."""
    for number, probe in enumerate(probes):
        if probe.pixels != known[number % len(known)]:
            raise AuditError(
                f"audit of weights version {version} failed: engine and learner see other pixels in the images of "
                f"prompt {probe.group.prompt.id}. The weights are equal bit for bit. Possible causes: different "
                "model.min_pixels or model.max_pixels, a different image processor"
            )


class Tolerance:
    """Largest mean gap in nats that passes an audit.

    Until the first push has passed, it is derived from dtype and number of layers; afterwards from the gap measured at
    that push, where the weights were equal bit for bit. It scales with |logprob|, because rounding is relative. A
    `fixed` tolerance replaces all of this.
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
        """Return the audit with its tolerance; raise AuditError if the mean gap exceeds it or a gap is not finite."""
        tolerance = self.of(audit)
        if not (audit.gap_mean <= tolerance and np.isfinite(audit.gap_max)):
            raise AuditError(
                f"audit of weights version {audit.version} failed: engine and learner differ by "
                f"{audit.gap_mean:.3g} nats on average and {audit.gap_max:.3g} at most over {audit.tokens} logprobs, "
                f"tolerance {tolerance:.3g} ({self._origin()}). Weights and pixels are equal bit for bit. Possible "
                "causes: caches kept across the push, a different rollout.temperature, a model that vLLM and "
                "transformers compute differently. If the gap is rounding, raise weights.audit_tolerance"
            )
        if self.measured is None:
            self.measured = audit.gap_mean / _size(audit)
        return replace(audit, tolerance=tolerance)

    def _origin(self) -> str:
        if self.fixed is not None:
            return "weights.audit_tolerance"
        return "from precision and depth" if self.measured is None else "from the gap at the first push"


def _size(audit: Audit) -> float:
    """Return the mean |logprob|, at least 1: rounding does not vanish where logprobs are near 0."""
    return max(1.0, audit.logp_mean)
