"""First proof of arrival: after a push, each engine computes with the very bits that the learner sent."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from othink_ray.weights.audit import AuditError
from othink_ray.weights.digest import TensorDigest

_NAMED = 3  # of the weights that are wrong


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldPart:
    """What one worker of an engine holds of a weight: the digest of its part, and how many elements that has."""

    value: int
    elements: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """What one worker of an engine computes with, of the weights that it was asked for."""

    parts: Mapping[str, HeldPart]
    faults: Mapping[str, str]  # what is wrong whatever was sent, by weight or parameter


def mismatches(expected: Mapping[str, TensorDigest], workers: Sequence[Held]) -> dict[str, str]:
    """What is wrong with an engine's weights, by name; nothing where it holds what was sent.

    Its workers may share a weight out, hold it whole, or anything between: each element equally often.
    """
    found: dict[str, str] = {}
    for name, weight in expected.items():
        parts = [worker.parts[name] for worker in workers if name in worker.parts]
        copies, rest = divmod(sum(part.elements for part in parts), math.prod(weight.shape))
        if copies == 0 or rest:
            found[name] = "is not in the engine, or not whole"
        elif (sum(part.value for part in parts) - copies * weight.value) % 2**64:
            found[name] = "differs from what the learner sent"
    for worker in workers:
        found |= worker.faults
    return found


def require_arrived(engines: Sequence[Mapping[str, str]], version: int) -> None:
    """Stops a run of which an engine computes with other weights than the learner sent; `engines`: their mismatches."""
    for number, faults in enumerate(engines):
        if faults:
            first = "; ".join(f"{name} {what}" for name, what in list(faults.items())[:_NAMED])
            more = f"; and {len(faults) - _NAMED} more" if len(faults) > _NAMED else ""
            raise AuditError(
                f"audit of weights version {version} failed: in engine {number} of {len(engines)}, digests of "
                f"{len(faults)} weights are wrong: {first}{more}. The logprobs were not compared. Look at: a push that "
                "was cut short or changed on its way (weights.transport), a weight that the engine's loader does not "
                "load or loads elsewhere, a copy of it that was not made anew (a tied lm_head, packed matrices)"
            )
