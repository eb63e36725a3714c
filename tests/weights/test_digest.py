"""Tensor digests against their definition in plain integers, and the faults that they must detect."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from othink_ray.weights import DigestCollector, _keys, as_matrix, digests, shard_digest

CPU = torch.device("cpu")
SHAPES = [(7,), (5, 3), (4, 2, 3), (1, 1), (1,), (3, 70_000)]
DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8]


def random(shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return values.abs().mul(50).to(dtype) if dtype == torch.uint8 else (10 * values).to(dtype)


def slow_digest(weight: Tensor) -> int:
    """Compute sum(a[row] * X[row, column] * b[column]) modulo 2**64 in Python integers."""
    rows = weight.reshape(weight.shape[0], -1).contiguous()
    raw = rows.view(torch.uint8).numpy().reshape(len(rows), -1)
    bits = raw if weight.element_size() == 1 else raw.view(np.int16)
    a = _keys(bits.shape[0], 64, CPU).tolist()
    b = _keys(bits.shape[1], 20, CPU).tolist()
    total = sum(a[i] * sum(int(x) * b[j] for j, x in enumerate(row)) for i, row in enumerate(bits.tolist()))
    return (total + 2**63) % 2**64 - 2**63


def splitmix(index: int) -> int:
    """Return the output of SplitMix64 after `index` steps."""
    z = index * 0x9E3779B97F4A7C15 % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return z ^ z >> 31


def value(weight: Tensor) -> int:
    return digests([("w", weight)])["w"].value


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_digest_equals_its_definition(dtype: torch.dtype) -> None:
    for shape in SHAPES:
        weight = random(shape, dtype)
        found = digests([("w", weight)])["w"]
        assert found.value == slow_digest(weight), shape
        assert (found.shape, found.dtype, found.nbytes) == (shape, dtype, weight.nbytes)


def test_large_matrices_are_summed_in_blocks_without_rounding() -> None:
    """With the largest possible bits and keys, every partial sum must be exact in float64."""
    weight = torch.full((9, 2**17), -1, dtype=torch.int16).view(torch.bfloat16)
    worst = torch.full((9, 2**17), -(2**15), dtype=torch.int16).view(torch.bfloat16)
    assert (value(weight), value(worst)) == (slow_digest(weight), slow_digest(worst))


def test_a_long_row_of_odd_values_is_summed_exactly() -> None:
    """Summed at once, they would give an odd number of more than float64's 53 bits."""
    weight = torch.full((1, 2**20 - 1), 2**15 - 1, dtype=torch.int16).view(torch.bfloat16)
    assert value(weight) == slow_digest(weight)


def test_keys_are_odd_distinct_and_fixed() -> None:
    rows, columns = _keys(5000, 64, CPU), _keys(5000, 20, CPU)
    assert torch.equal(rows & 1, torch.ones_like(rows))
    assert torch.equal(columns & 1, torch.ones_like(columns))
    assert len(set(rows.tolist())) == 5000
    assert int(columns.max()) < 2**20
    assert torch.equal(_keys(3, 64, CPU), rows[:3])
    for index in (0, 1, 4999):
        assert int(rows[index]) % 2**64 == splitmix(index + 1 + (64 << 32)) | 1
        assert int(columns[index]) == splitmix(index + 1 + (20 << 32)) >> 44 | 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_digests_of_shards_add_up_for_any_split(dtype: torch.dtype) -> None:
    """Rows and columns as tensor parallelism splits them, and zero padding."""
    weight = random((30, 24), dtype)
    padded = torch.zeros(40, 24, dtype=dtype)
    padded[:30] = weight
    assert value(padded) == value(weight)
    for rows in ([0, 30], [0, 11, 30]):
        for columns in ([0, 24], [0, 5, 24]):
            parts = sum(
                int(shard_digest(weight[top:bottom, left:right], top, left))
                for top, bottom in pairwise(rows)
                for left, right in pairwise(columns)
            )
            assert (parts - value(weight)) % 2**64 == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_digest_does_not_depend_on_the_memory_layout(dtype: torch.dtype) -> None:
    weight = random((6, 8), dtype)
    assert value(weight.T.contiguous().T) == value(weight)
    assert value(torch.stack([weight, weight])[1]) == value(weight)


def faults() -> dict[str, Tensor]:
    weight = random((16, 12))
    changed = {}
    one_bit = weight.clone()
    one_bit.view(torch.int16)[3, 4] ^= 1
    changed["one ulp of one element"] = one_bit
    both = weight.clone()
    both.view(torch.int16)[3, 4] += 1
    both.view(torch.int16)[3, 5] -= 1
    changed["one element one ulp up, another one down"] = both
    signs = -weight
    changed["all signs"] = signs
    changed["rows swapped"] = weight.flip(0)
    changed["columns swapped"] = weight.flip(1)
    changed["shifted"] = weight.roll(1, 1)
    changed["scaled"] = weight * 1.01
    changed["one row missing"] = torch.cat([weight[:-1], torch.zeros(1, 12, dtype=weight.dtype)])
    changed["an older version"] = random((16, 12), seed=1)
    return changed


@pytest.mark.parametrize("fault", faults())
def test_a_tensor_that_differs_has_another_digest(fault: str) -> None:
    assert value(faults()[fault]) != value(random((16, 12)))


def test_flipping_all_float32_signs_changes_the_digest() -> None:
    weight = random((16, 12), torch.float32)
    assert value(-weight) != value(weight)


def test_updates_of_a_few_ulps_always_change_the_digest() -> None:
    """Ten thousand random sparse updates of one ulp, as bfloat16 training at lr 1e-6 makes."""
    draw = torch.Generator().manual_seed(0)
    differences = torch.zeros(10_000, 8, 8, dtype=torch.int16)
    positions = torch.randint(64, (10_000, 4), generator=draw)
    steps = torch.randint(0, 2, (10_000, 4), generator=draw, dtype=torch.int16) * 2 - 1
    differences.view(10_000, 64).scatter_(1, positions, steps)
    assert all(int(shard_digest(difference.view(torch.bfloat16), 0, 0)) != 0 for difference in differences)


def test_tensors_pass_unchanged_and_are_digested_in_passing() -> None:
    collector = DigestCollector()
    weights = {"a": random((3, 4)), "b": random((5,), torch.float32)}
    before = digests(weights.items())
    for name, weight in collector.passing(weights.items()):
        assert weight is weights[name]
        weight.zero_()
    assert collector.digests() == before
    assert list(before) == ["a", "b"]


def test_a_parameter_is_digested_without_its_autograd_graph() -> None:
    weight = torch.nn.Parameter(random((3, 4)))
    assert as_matrix(weight).requires_grad is False
    assert value(weight) == value(weight.detach())


def test_a_vector_is_one_column_and_a_kernel_a_row_per_output() -> None:
    assert as_matrix(random((5,))).shape == (5, 1)
    assert as_matrix(random((4, 2, 3))).shape == (4, 6)
    assert as_matrix(torch.tensor(1.0)).shape == (1, 1)
    assert value(torch.empty(0, 4)) == 0
    assert digests([]) == {}
