"""Transfer of weights from the learner to the engines: buckets of bytes, and digests that prove their arrival.

A digest is an additive checksum of a tensor's bits. The tensor is read as a matrix X of 16-bit integers; with fixed
pseudo-random keys a and b, the digest is the sum of a[row] * X[row, column] * b[column] modulo 2**64. Sums are exact in
any order, so CPU and GPU agree bit for bit, and the digests of shards add up to the digest of the whole tensor. A
flipped bit, a swap or a shift changes the digest; zero padding does not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from othink_ray.weights.audit import AuditError

_KEY_BITS = 20  # 16-bit values x 20-bit keys, 2**16 columns summed at a time: exact in float64's 53 bits
_COLUMNS = 2**16
_BLOCK = {"cpu": 2**18, "cuda": 2**23}  # values converted at a time: fits a core's cache; 64 MiB on a GPU
_NAMED = 3  # wrong weights named in an error message


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
    """Raise AuditError if an engine computes with other weights than the learner sent; `engines` are `mismatches`."""
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
