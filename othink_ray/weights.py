"""Weights on their way to the engines: buckets of bytes, digests that prove their arrival, and the audit of a push.

A digest is an additive checksum of a tensor's bits. The tensor is read as a matrix X of 16-bit integers; with fixed
pseudo-random keys a and b, the digest is the sum of a[row] * X[row, column] * b[column] modulo 2**64. Sums are exact in
any order, so CPU and GPU agree bit for bit, and the digests of shards add up to the digest of the whole tensor. A
flipped bit, a swap or a shift changes the digest; zero padding does not.

The audit covers everything else that determines the policy: pixels, tokens, positions, temperature, caches kept across
the push, and the arithmetic itself. Engine and learner must give the same tokens the same logprobs, up to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from othink_ray.types import Audit, PixelDigest, Probe

_KEY_BITS = 20  # 16-bit values x 20-bit keys, 2**16 columns summed at a time: exact in float64's 53 bits
_COLUMNS = 2**16
_BLOCK = {"cpu": 2**18, "cuda": 2**23}  # values converted at a time: fits a core's cache; 64 MiB on a GPU
_NAMED = 3  # wrong weights named in an error message
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


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """Name, shape and dtype of one tensor in a bucket."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """Several tensors back to back in one byte buffer."""

    specs: tuple[TensorSpec, ...]
    data: NDArray[np.uint8]


def to_buckets(weights: Iterable[tuple[str, Tensor]], bucket_bytes: int) -> Iterator[Bucket]:
    """Yield buckets of at most `bucket_bytes`, in order; a larger tensor gets a separate bucket."""
    specs: list[TensorSpec] = []
    data, used = np.empty(0, dtype=np.uint8), 0
    for name, weight in weights:
        spec = TensorSpec(name=name, shape=tuple(weight.shape), dtype=weight.dtype)
        if used + spec.nbytes > len(data):
            if specs:
                yield Bucket(specs=tuple(specs), data=data[:used])
            specs, used = [], 0
            data = np.empty(max(bucket_bytes, spec.nbytes), dtype=np.uint8)  # unwritten pages use no memory
        specs.append(spec)
        # Copy now: the learner may overwrite or release the parameter before the bucket is sent.
        raw = weight.contiguous().view(-1).view(torch.uint8)
        torch.from_numpy(data[used : used + spec.nbytes]).copy_(raw)
        used += spec.nbytes
    if specs:
        yield Bucket(specs=tuple(specs), data=data[:used])


def from_buckets(buckets: Iterable[Bucket]) -> Iterator[tuple[str, Tensor]]:
    """Yield the named tensors as copies: shared buffers are read-only, and engines may keep or modify the tensors."""
    for bucket in buckets:
        start = 0
        for spec in bucket.specs:
            weight = torch.empty(spec.shape, dtype=spec.dtype)
            weight.view(-1).view(torch.uint8).numpy()[:] = bucket.data[start : start + spec.nbytes]
            yield spec.name, weight
            start += spec.nbytes


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorDigest:
    """Digest, shape and dtype that a received tensor must match."""

    value: int  # signed 64 bits
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def digests(weights: Iterable[tuple[str, Tensor]]) -> dict[str, TensorDigest]:
    """Return the digest of each tensor by name."""
    collected = DigestCollector()
    for _ in collected.passing(weights):
        pass
    return collected.digests()


class DigestCollector:
    """Computes digests of a stream of tensors on their device; the values are read back once, at the end."""

    def __init__(self) -> None:
        self._passed: list[tuple[str, Tensor, tuple[int, ...], torch.dtype]] = []

    def passing(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, weight in weights:
            self._passed.append((name, shard_digest(as_matrix(weight), 0, 0), tuple(weight.shape), weight.dtype))
            yield name, weight

    def digests(self) -> dict[str, TensorDigest]:
        values = read_back([value for _, value, _, _ in self._passed])
        return {
            name: TensorDigest(value=value, shape=shape, dtype=dtype)
            for (name, _, shape, dtype), value in zip(self._passed, values, strict=True)
        }


def as_matrix(weight: Tensor) -> Tensor:
    """Return a view (first dimension, product of the others); a vector becomes one column."""
    return (
        weight.detach().reshape(weight.shape[0] if weight.ndim else 1, -1) if weight.numel() else weight.new_empty(0, 1)
    )


def read_back(values: list[Tensor]) -> list[int]:
    """Return scalar tensors as ints, in one transfer from the device."""
    found: list[int] = torch.stack(values).tolist() if values else []
    return found


def shard_digest(shard: Tensor, first_row: int, first_column: int) -> Tensor:
    """Return the contribution of a shard (rows, columns) to its matrix's digest, an int64 scalar on its device."""
    bits = _bits(shard)
    parts = shard.element_size() // bits.element_size()
    rows, columns = bits.shape
    row_keys = _keys(first_row + rows, 64, shard.device)[first_row:]
    column_keys = _keys((first_column * parts) + columns, _KEY_BITS, shard.device)[first_column * parts :].double()
    total = torch.zeros((), dtype=torch.int64, device=shard.device)
    for left in range(0, columns, _COLUMNS):
        width = min(_COLUMNS, columns - left)
        height = max(1, _BLOCK.get(shard.device.type, _BLOCK["cpu"]) // width)
        for top in range(0, rows, height):
            block = bits[top : top + height, left : left + width].double()
            sums = torch.mv(block, column_keys[left : left + width]).long()
            total += (sums * row_keys[top : top + height]).sum()
    return total


def _bits(shard: Tensor) -> Tensor:
    """View as 16-bit integers (8-bit for one-byte elements); wider elements become several columns."""
    dense = shard if shard.stride(-1) == 1 else shard.clone(memory_format=torch.contiguous_format)
    return dense.view(torch.uint8 if shard.element_size() == 1 else torch.int16)


def _keys(count: int, bits: int, device: torch.device) -> Tensor:
    """Return pseudo-random odd keys (count,), equal on every machine; tables of a power of two are cached."""
    return _key_table(1 << max(10, (count - 1).bit_length()), bits, device)[:count]


@lru_cache(maxsize=16)
def _key_table(count: int, bits: int, device: torch.device) -> Tensor:
    """Compute SplitMix64 of 0, 1, 2, ...; int64 arithmetic wraps modulo 2**64."""
    state = (torch.arange(1, count + 1, dtype=torch.int64) + (bits << 32)) * 0x9E3779B97F4A7C15
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        state = (state ^ _shifted(state, shift)) * factor
    state = state ^ _shifted(state, 31)
    return (_shifted(state, 64 - bits) | 1).to(device)


def _shifted(numbers: Tensor, by: int) -> Tensor:
    """Shift right logically: torch's shift is arithmetic and would repeat the sign bit."""
    return (numbers >> by) & ((1 << (64 - by)) - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardDigest:
    """The shard of a weight in one engine worker: its share of the digest, and its number of elements."""

    value: int
    elements: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerDigests:
    """Digests of the weights that one engine worker computes with, and the faults that it found in them."""

    shards: Mapping[str, ShardDigest]
    faults: Mapping[str, str]  # problems that do not depend on what was sent, by weight or parameter name


def mismatches(expected: Mapping[str, TensorDigest], workers: Sequence[WorkerDigests]) -> dict[str, str]:
    """Return what is wrong with an engine's weights, by name; empty if it holds what was sent.

    Its workers may shard a weight, replicate it, or both, as long as each element is held equally often.
    """
    found: dict[str, str] = {}
    for name, weight in expected.items():
        shards = [worker.shards[name] for worker in workers if name in worker.shards]
        copies, rest = divmod(sum(shard.elements for shard in shards), math.prod(weight.shape))
        if copies == 0 or rest:
            found[name] = "is not in the engine, or not whole"
        elif (sum(shard.value for shard in shards) - copies * weight.value) % 2**64:
            found[name] = "differs from what the learner sent"
    for worker in workers:
        found |= worker.faults
    return found


def require_arrived(engines: Sequence[Mapping[str, str]], version: int) -> None:
    """Raise AuditError if an engine's weights differ from those sent; `engines` holds the `mismatches` of each."""
    for number, faults in enumerate(engines):
        if faults:
            first = "; ".join(f"{name} {what}" for name, what in list(faults.items())[:_NAMED])
            more = f"; and {len(faults) - _NAMED} more" if len(faults) > _NAMED else ""
            raise AuditError(
                f"audit of weights version {version} failed: in engine {number} of {len(engines)}, digests of "
                f"{len(faults)} weights are wrong: {first}{more}. The logprobs were not compared. Possible causes: a "
                "push that was interrupted or corrupted (weights.transport), a weight that the engine's loader skips "
                "or loads elsewhere, a copy of it that was not refreshed (a tied lm_head, packed matrices)"
            )


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
    """Raise AuditError if an engine's pixels differ from the learner's (`known`, in the prompt order of `compare`)."""
    for number, probe in enumerate(probes):
        if probe.pixels != known[number % len(known)]:
            raise AuditError(
                f"audit of weights version {version} failed: engine and learner have different pixels for the images "
                f"of prompt {probe.group.prompt.id}. The weights are equal bit for bit, but the image processors "
                "differ; check that both load the same transformers version and the same preprocessor_config.json"
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
