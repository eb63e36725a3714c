"""Weight buckets: tensors to byte buffers and back."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from othink_ray.engines.policy import Policy
from othink_ray.weights import Bucket, from_buckets, to_buckets
from tests.engines.samples import sent_weights

MIXED: dict[str, Tensor] = {
    "floats": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)),
    "halves": torch.randn(7, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16),
    "scalar": torch.tensor(2.5, dtype=torch.float64),
    "empty": torch.empty(0, 4),
    "integers": torch.arange(6).reshape(2, 3),
    "odd bytes": torch.tensor([True, False, True]),
    "unaligned": torch.tensor([1.5, -2.5]),
    "a view": torch.arange(12.0).reshape(3, 4).T,
}


def assert_same(found: list[tuple[str, Tensor]], expected: list[tuple[str, Tensor]]) -> None:
    assert [name for name, _ in found] == [name for name, _ in expected]
    for (name, tensor), (_, original) in zip(found, expected, strict=True):
        assert (tensor.dtype, tensor.shape) == (original.dtype, original.shape), name
        assert torch.equal(tensor, original), name


@pytest.mark.parametrize("bucket_bytes", [1, 16, 64, 10**6])
def test_every_kind_of_tensor_is_restored_exactly(bucket_bytes: int) -> None:
    buckets = list(to_buckets(MIXED.items(), bucket_bytes))
    assert_same(list(from_buckets(buckets)), list(MIXED.items()))
    for bucket in buckets:
        assert bucket.data.nbytes == sum(spec.nbytes for spec in bucket.specs)
        assert bucket.data.nbytes <= bucket_bytes or sum(spec.nbytes > 0 for spec in bucket.specs) == 1


def test_a_network_fits_in_few_buckets(policy: Policy) -> None:
    weights = sent_weights(policy.network)
    total = sum(weight.nbytes for _, weight in weights)
    buckets = list(to_buckets(weights, 2**20))
    assert total / 2**20 <= len(buckets) <= 2 * total / 2**20 + 1
    assert_same(list(from_buckets(buckets)), weights)


def test_a_bucket_is_filled_to_its_last_byte() -> None:
    bits = [(name, torch.tensor([True])) for name in "ab"]
    assert [len(bucket.specs) for bucket in to_buckets(bits, 100)] == [2]
    fives = [(name, torch.ones(5)) for name in "abc"]
    assert [len(bucket.specs) for bucket in to_buckets(fives, 40)] == [2, 1]


def test_empty_tensors_are_sent_as_bytes_too() -> None:
    [bucket] = to_buckets([("none", torch.empty(0, 4)), ("nor here", torch.empty(0))], 100)
    assert (bucket.data.dtype, bucket.data.size) == (np.uint8, 0)
    assert_same(list(from_buckets([bucket])), [("none", torch.empty(0, 4)), ("nor here", torch.empty(0))])


def test_a_parameter_is_sent_without_its_autograd_graph() -> None:
    weight = torch.nn.Parameter(torch.arange(3.0))
    [(_, received)] = from_buckets(to_buckets([("w", weight)], 100))
    assert torch.equal(received, weight) and not received.requires_grad


def test_no_tensors_give_no_buckets() -> None:
    assert list(to_buckets([], 100)) == []
    assert list(from_buckets([])) == []


def test_a_bucket_does_not_change_when_the_weight_does() -> None:
    weight = torch.ones(4)
    [bucket] = to_buckets([("w", weight)], 100)
    weight.zero_()
    assert_same(list(from_buckets([bucket])), [("w", torch.ones(4))])


def test_tensors_from_a_read_only_buffer_can_be_written() -> None:
    [bucket] = to_buckets([("w", torch.ones(4))], 100)
    bucket.data.flags.writeable = False
    [(_, received)] = from_buckets([bucket])
    received.zero_()
    assert not received.any()
    assert_same(list(from_buckets([bucket])), [("w", torch.ones(4))])


def test_buckets_are_produced_lazily() -> None:
    """A policy that does not fit in memory twice is sent bucket by bucket."""
    requested: list[str] = []

    def one_by_one() -> Iterator[tuple[str, Tensor]]:
        for name in "abc":
            requested.append(name)
            yield name, torch.ones(10)

    first = next(iter(to_buckets(one_by_one(), 40)))
    assert [spec.name for spec in first.specs] == ["a"]
    assert requested == ["a", "b"]


def test_a_buffer_is_bytes_back_to_back() -> None:
    [bucket] = to_buckets([("a", torch.tensor([1.0])), ("b", torch.tensor([2], dtype=torch.int16))], 100)
    assert isinstance(bucket, Bucket)
    assert bucket.data.tobytes() == np.float32(1).tobytes() + np.int16(2).tobytes()
